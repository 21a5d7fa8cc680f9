"""The one place that knows CPU from GPU, and the one place where a dependency is patched, each patch with its reason."""

import collections
import contextlib
import functools
import gc
import logging
import os
from collections.abc import Callable, Iterable, Iterator

import torch

from megadsl.errors import UserError

_state = {"prepared": None}


@contextlib.contextmanager
def _compilation_deferred() -> Iterator[None]:
    """Within it, torch.compile(function) gives a function that is compiled at its first call."""
    torch_compile = torch.compile

    def deferred(function: Callable) -> Callable:
        compiled = functools.cache(lambda: torch_compile(function))

        @functools.wraps(function)
        def call(*args, **kwargs):
            return compiled()(*args, **kwargs)

        return call

    torch.compile = deferred
    try:
        yield
    finally:
        torch.compile = torch_compile


@contextlib.contextmanager
def _collector_off() -> Iterator[None]:
    """Nothing that an import makes is garbage; looking through it again and again is a fifth of its time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()  # later collections leave out what was imported
        if enabled:
            gc.enable()


# Reason: Megatron-core decorates 28 small functions with torch.compile (its jit_fuser), and the first of them imports Dynamo
# and Inductor: 2 s of every start, for functions that a CPU run never calls. Nothing is lost on a GPU, where torch.compile
# itself compiles at the first call. Whatever imports Megatron-core imports this module before it (a test sees to that).
with _compilation_deferred(), _collector_off():
    import megatron.core  # noqa: F401, E402


def prepare_device(name: str = "auto", local_rank: int = 0, deterministic: bool = False) -> torch.device:
    """Choose the device of this process and make Megatron-core work on it. Call before it is used, and before DeepSpeed is imported.

    Args:
        name: auto, cpu or cuda.
        local_rank: of this process on its machine.
        deterministic: equal inputs give equal bits; an operation that has no such kernel raises.
    """
    if name not in ("auto", "cpu", "cuda"):
        raise UserError(f"There is no device '{name}'; it is auto, cpu or cuda (the launcher decides which GPU).")
    _choose_kernels(deterministic)
    kind = name if name != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
    if kind == "cuda":
        if not torch.cuda.is_available():
            raise UserError("training.device is cuda, but torch finds no GPU; set training.device=auto or cpu.")
        torch.cuda.set_device(device_ordinal(local_rank, torch.cuda.device_count()))
        device = torch.device("cuda", torch.cuda.current_device())
    else:
        # DeepSpeed decides at import; without this it would take the GPU of a machine that has one.
        os.environ["DS_ACCELERATOR"] = "cpu"
        device = torch.device("cpu")
    if _state["prepared"] is None:
        logging.getLogger("megatron.core").setLevel(logging.ERROR)
        if kind == "cpu":
            _patch_megatron_for_cpu()
        _state["prepared"] = kind
    elif _state["prepared"] != kind:
        raise RuntimeError(f"this process already runs on {_state['prepared']}, it cannot change to {kind}")
    return device


def device_ordinal(local_rank: int, visible: int) -> int:
    """Which of the `visible` GPUs of this process is its own: the only place where a local rank becomes a device.

    A launcher shows every process all GPUs of the machine, so that they are numbered like the local ranks, or each process its
    share alone (srun --gpus-per-task=1), so that every process counts from 0.
    """
    return local_rank % visible


def on_gpu() -> bool:
    """Whether this process was prepared for a GPU. A machine may have one that the run does not use (training.device=cpu)."""
    return _state["prepared"] == "cuda"


def gpu_identity(device: torch.device) -> str:
    """A name of the GPU that is the same in every process, whatever number it has there; "" for a CPU."""
    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else ""


def communication_backend(device: torch.device) -> str:
    return "nccl" if device.type == "cuda" else "gloo"


def device_name(device: torch.device) -> str:
    """The maker's name of a GPU, such as NVIDIA H100 80GB HBM3; "cpu"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def peak_memory_bytes(device: torch.device) -> int:
    """Largest memory that this process has held: of the GPU, or resident on the host."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def ahead_on_device(batches: Iterable[dict[str, torch.Tensor]], device: torch.device) -> Iterator[dict[str, torch.Tensor]]:
    """The batches on the device, each copied while the one before it is worked on (they should be in pinned memory)."""
    if device.type != "cuda":
        yield from batches
        return
    stream, waiting = torch.cuda.Stream(device), None
    for batch in batches:
        with torch.cuda.stream(stream):
            copied = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
        arriving = copied, stream.record_event()
        if waiting is not None:
            yield _arrived(*waiting)
        waiting = arriving
    if waiting is not None:
        yield _arrived(*waiting)


def _arrived(batch: dict[str, torch.Tensor], copied: "torch.cuda.Event") -> dict[str, torch.Tensor]:
    """Make the current stream wait for a batch's copies, and keep their memory until it has used them."""
    current = torch.cuda.current_stream()
    current.wait_event(copied)
    for tensor in batch.values():
        tensor.record_stream(current)
    return batch


def _choose_kernels(deterministic: bool) -> None:
    if deterministic:
        # cuBLAS reads it when it is first used; with its default workspace, streams may share one and add in another order.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic)


def prepare_deepspeed(device: torch.device) -> None:
    """Import DeepSpeed, quiet and without its compiled ops on a CPU. Call after prepare_device, before DeepSpeed is used."""
    import deepspeed.ops
    import deepspeed.utils  # sets the level of its logger at import, so change it afterwards

    deepspeed.utils.logger.setLevel(logging.ERROR)
    # Reason: to see whether an optimizer is its Muon, DeepSpeed imports that, and the same happens: 1.6 s of every start.
    with _compilation_deferred():
        import deepspeed.runtime.zero.muon.original_muon  # noqa: F401
    if device.type == "cpu":
        # Reason: the first init_distributed on CPU compiles the shared-memory op for 25 s (it serves inference_all_reduce
        # only), and finding out which ops could be compiled runs a compiler too. No op of DeepSpeed is used on CPU.
        deepspeed.ops.__compatible_ops__ = collections.defaultdict(bool)


def _patch_megatron_for_cpu() -> None:
    """Megatron-core writes device=torch.cuda.current_device() in its layers and mappings, and keeps its RNG on the GPU."""
    # Reason: every `device=torch.cuda.current_device()` in mappings, layers, rotary embedding then allocates on the CPU.
    torch.cuda.current_device = lambda: torch.device("cpu")
    # Reason: without a GPU it notes the seed for later, with the caller's stack in words: 1 ms a micro-batch.
    torch.cuda.manual_seed = lambda seed: None
    # Reason: dist_checkpointing synchronises before it writes.
    torch.cuda.synchronize = lambda *args, **kwargs: None

    from megatron.core.tensor_parallel import random

    # Reason: the tracker forks the GPU's generator; on a CPU the default generator takes its place.
    random._get_cuda_rng_state = lambda device=-1, clone=False, graph_safe=False: torch.get_rng_state()
    random._set_cuda_rng_state = lambda new_state, device=-1, graph_safe=False: torch.set_rng_state(new_state)
    random._CUDA_RNG_STATE_TRACKER = _cpu_rng_tracker(random.CudaRNGStatesTracker)
    random._CUDA_RNG_STATE_TRACKER_INITIALIZED = True


def _cpu_rng_tracker(base: type):
    class CpuRngTracker(base):
        """Megatron's tracker on the CPU generator."""

        def add(self, name, seed):
            if name in self.states_:
                raise ValueError(f"the random state {name} is already tracked")
            self.states_[name] = torch.Generator().manual_seed(seed).get_state()
            self._is_initialized = True

        @contextlib.contextmanager
        def fork(self, name="model-parallel-rng"):
            outer = torch.get_rng_state()
            torch.set_rng_state(self.states_[name])
            try:
                yield
            finally:
                self.states_[name] = torch.get_rng_state()
                torch.set_rng_state(outer)

    return CpuRngTracker()


