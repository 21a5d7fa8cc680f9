"""Step times of tools/gpu_check.py: our decoder under two schemes and Megatron-core's own GPTModel, paired in one process.

The three models have one shape and take turns step by step (forward, backward, fused AdamW) on the same batch; ratios are medians
over the pairs. The stock model has Megatron-core's local layers with our core attention (torch's SDPA), because its own unfused
attention would be compared otherwise. FLOPs are the matrix multiplications of megadsl/model/flops.py; the peak they are
held against is a large matrix product timed in the same process.

Shape letters: b batch, s sequence, v vocabulary.
"""

import statistics
import time
from collections.abc import Callable

import torch

from megadsl.config.load import parse_config
from megadsl.config.run import Config
from megadsl.parallel.device import prepare_device

SCHEMES = ("dslm", "vanilla")
WARM_UP = 2  # steps that are not counted: kernels are compiled and tuned in them


def measure(device_name: str, layers: int, hidden: int, heads: int, seq_length: int, batch: int, vocab_size: int, pairs: int,
            gemm: int, precision: str) -> dict[str, float]:
    """Seconds, ratios and rates by name; `gemm` is the side of the square matrices that the peak is measured with."""
    from megadsl.model.flops import training_flops
    from megadsl.parallel.groups import initialize_groups
    from megadsl.parallel.launch import Launch
    from megadsl.parallel.rng import seed_micro_batch
    from megadsl.parallel.topology import Topology

    device = prepare_device(device_name)
    initialize_groups(Launch.alone(), Topology(1, 1, 1), device)
    seed_micro_batch(0, 0, 0)
    configs = {scheme: parse_config({
        "model": {"num_layers": layers, "hidden_size": hidden, "num_attention_heads": heads, "seq_length": seq_length},
        "scheme": scheme, "parallel": {"zero_stage": 1}, "training": {"precision": precision},
    }) for scheme in SCHEMES}
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, vocab_size, (batch, seq_length + 1), generator=generator).to(device)
    inputs, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    steps = {scheme: ours(config, vocab_size, device, inputs, labels) for scheme, config in configs.items()}
    steps["stock"] = stock(configs["vanilla"], vocab_size, device, inputs, labels)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for pair in range(pairs + WARM_UP):
        # The order alternates, so that nobody profits from the other's warm caches.
        for name in sorted(steps, reverse=pair % 2 == 0):
            taken = timed(steps[name], device)
            if pair >= WARM_UP:
                seconds[name].append(taken)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    flops = batch * training_flops(configs["dslm"].model, seq_length * hidden * vocab_size)
    peak = gemm_flops_per_second(gemm, device, configs["dslm"])
    return {
        **{f"seconds_{name}": value for name, value in median.items()},
        "dslm_over_vanilla": ratio(seconds, "dslm", "vanilla"), "vanilla_over_stock": ratio(seconds, "vanilla", "stock"),
        "tokens_per_second": batch * seq_length / median["dslm"], "tflops": flops / median["dslm"] / 1e12,
        "gemm_tflops": peak / 1e12, "share_of_gemm": flops / median["dslm"] / peak,
    }


def ours(config: Config, vocab_size: int, device: torch.device, inputs: torch.Tensor, labels: torch.Tensor) -> Callable[[], None]:
    """One training step of our model on this batch."""
    from megadsl.model.init import initialize
    from megadsl.model.precision import prepare_precision
    from megadsl.model.stack import SequentialModel
    from megadsl.tasks.planning import plan_for_run
    from megadsl.tasks.registry import task_of

    task = task_of(config)
    definition = task.define_model(plan_for_run(config), vocab_size)
    model = SequentialModel(definition.entries)
    prepare_precision(model, config.training.precision)
    initialize(model.canonical_parameters(), 1, 0, 1)
    model.to(device).train()
    targets = {"labels": labels, "loss_mask": torch.ones_like(labels, dtype=torch.float32)}
    return step(model, lambda: task.loss(model({"tokens": inputs}), targets)[0] / labels.numel())


def stock(config: Config, vocab_size: int, device: torch.device, inputs: torch.Tensor, labels: torch.Tensor) -> Callable[[], None]:
    """The same of Megatron-core's GPTModel."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    from megadsl.model.core_attention import ScaledDotProductAttention
    from megadsl.model.layer import transformer_config
    from megadsl.model.precision import prepare_precision

    spec = get_gpt_layer_local_spec()
    spec.submodules.self_attention.submodules.core_attention = ScaledDotProductAttention
    model = GPTModel(
        transformer_config(config.model, precision=config.training.precision), spec, vocab_size, config.model.seq_length,
        share_embeddings_and_output_weights=True,
    )
    prepare_precision(model, config.training.precision)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:  # its own initialisation is off in our transformer_config; norms and biases have theirs
                parameter.normal_(0.0, 0.02)
    model.to(device).train()
    positions = torch.arange(inputs.size(1), device=device).expand_as(inputs)
    return step(model, lambda: model(inputs, positions, None, labels=labels).mean())


def step(model: torch.nn.Module, loss: Callable[[], torch.Tensor]) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def run() -> None:
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def timed(run: Callable[[], object], device: torch.device) -> float:
    synchronize(device)
    begun = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - begun


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def ratio(seconds: dict[str, list[float]], first: str, second: str) -> float:
    return statistics.median(a / b for a, b in zip(seconds[first], seconds[second], strict=True))


def gemm_flops_per_second(side: int, device: torch.device, config: Config) -> float:
    """What a square matrix product achieves in the precision of the run."""
    from megadsl.model.precision import DTYPES

    left, right = (torch.randn(side, side, device=device, dtype=DTYPES[config.training.precision]) for _ in range(2))
    best = min(timed(lambda: left @ right, device) for _ in range(8))
    return 2 * side**3 / best
