"""Process groups: Megatron-core's parallel_state, and the face of it that DeepSpeed asks for as `mpu`."""

from datetime import timedelta

import torch
import torch.distributed as dist

from megadsl.parallel.device import communication_backend, prepare_deepspeed  # isort: skip  (before Megatron-core)
from megatron.core import parallel_state

from megadsl.parallel.launch import Launch
from megadsl.parallel.topology import Topology


def initialize_groups(launch: Launch, topology: Topology, device: torch.device, timeout_minutes: float = 10.0) -> None:
    """Join the job's process group and form Megatron's tensor, pipeline and data groups.

    Training calls join_deepspeed as well; what only runs a model pays no seconds for importing DeepSpeed.
    """
    launch.export(device.index)
    if not dist.is_initialized():
        # One process has nobody to meet: a store in its memory, so that no port can be taken by somebody else.
        meeting_place = {"store": dist.HashStore()} if launch.world_size == 1 else {}
        dist.init_process_group(
            communication_backend(device), rank=launch.rank, world_size=launch.world_size,
            timeout=timedelta(minutes=timeout_minutes), **meeting_place,
        )
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=topology.tensor,
        pipeline_model_parallel_size=topology.pipeline,
        distributed_timeout_minutes=max(1, round(timeout_minutes)),
        create_gloo_process_groups=False,
    )


def join_deepspeed(device: torch.device) -> None:
    """Let DeepSpeed take over the process group that exists. PipelineModule asks it for ranks, so call this before one is built."""
    prepare_deepspeed(device)
    import deepspeed  # not at the top: it picks its accelerator at import, after megadsl.parallel.device has chosen

    deepspeed.init_distributed(communication_backend(device), auto_mpi_discovery=False, verbose=False)


def destroy_groups() -> None:
    """Leave all groups (a process that ends without it makes its peers print warnings)."""
    if dist.is_initialized():
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def tensor_group() -> dist.ProcessGroup:
    """The ranks that share every matrix with this one."""
    return parallel_state.get_tensor_model_parallel_group()


def data_group() -> dist.ProcessGroup:
    """The ranks that hold the same part of the model and see other data."""
    return parallel_state.get_data_parallel_group()


def stage_group() -> dist.ProcessGroup:
    """The ranks of this pipeline stage (tensor x data)."""
    return parallel_state.get_tensor_and_data_parallel_group()


def sum_over_data_ranks(values: torch.Tensor) -> torch.Tensor:
    """`values` summed over the data-parallel ranks, in place."""
    if dist.get_world_size(data_group()) > 1:
        dist.all_reduce(values, group=data_group())
    return values


def gather_over_data_ranks(value: object) -> list:
    """What every data-parallel rank gives, in their order; any object that can be pickled."""
    found = [None] * dist.get_world_size(data_group())
    dist.all_gather_object(found, value, group=data_group())
    return found


def sum_over_replicas_and_stages(values: torch.Tensor) -> torch.Tensor:
    """`values` summed over data-parallel ranks and pipeline stages, in place: all ranks get what the last stage found, where the
    others give zeros."""
    sum_over_data_ranks(values)
    stages = parallel_state.get_pipeline_model_parallel_group()
    if dist.get_world_size(stages) > 1:
        dist.all_reduce(values, group=stages)
    return values


def largest_over_ranks(value: float, device: torch.device) -> float:
    """The largest `value` of all ranks, on all ranks."""
    found = torch.tensor(value, dtype=torch.float64, device=device)
    if dist.get_world_size() > 1:
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return found.item()


def sum_over_all_ranks(values: torch.Tensor) -> torch.Tensor:
    """`values` summed over all ranks, in place."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(values)
    return values


def names_of_all_ranks(own: dict[str, int]) -> dict[str, int]:
    """The entries that any rank gives, in the order of ranks; on all ranks together."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return dict(own)
    gathered: list[dict[str, int]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, own)
    return {name: value for one in gathered for name, value in one.items()}


def add_up_signal(sums: torch.Tensor, largest: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`sums` added over all ranks and the largest of `largest`, on all ranks."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return sum_over_all_ranks(sums), largest


def broadcast_over_stages(value):
    """What the first pipeline stage gives, on all stages (any object that can be pickled)."""
    values = [value]
    dist.broadcast_object_list(values, src=parallel_state.get_pipeline_model_parallel_first_rank(),
                               group=parallel_state.get_pipeline_model_parallel_group())
    return values[0]


class DeepSpeedMpu:
    """parallel_state under the names that DeepSpeed uses. "Model parallel" means tensor parallel to DeepSpeed.

    Without an mpu DeepSpeed averages tensor shards as if they were replicas, silently.
    """

    get_model_parallel_rank = staticmethod(parallel_state.get_tensor_model_parallel_rank)
    get_model_parallel_world_size = staticmethod(parallel_state.get_tensor_model_parallel_world_size)
    get_model_parallel_group = staticmethod(parallel_state.get_tensor_model_parallel_group)

    def __getattr__(self, name: str):
        return getattr(parallel_state, name)
