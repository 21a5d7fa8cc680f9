"""Initialisation in one pass after construction, keyed by (seed, parameter name, role) and independent of the layout.

Every parameter is tagged where it is made with its role, its standard deviation (from the SignalPlan) and how tensor
parallelism slices it. A rank draws on the CPU in fp32 what it holds and nothing else, as ranges of streams that do not depend
on the layout (normal.py), so that every layout starts from bit-equal weights. The same tags serve the optimizer (which roles
decay) and checkpoints (which part of a full tensor is whose).

Shape letters: h hidden, n heads, g query groups, d head size, f FFN size.
"""

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod

import torch
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes

from megadsl.model.normal import normal_numbers
from megadsl.parallel.rng import key_from

# Every role of a parameter that a plan or a language model knows, and whether weight decay pulls it towards zero: matrices; on norms,
# biases, embeddings and gates the field does without it. query_key_value is self-attention's, query and key_value cross-attention's.
DECAYS = {
    "query_key_value": True, "query": True, "key_value": True, "attention_output": True, "fc1": True, "fc2": True,
    "input_projection": True, "output_head": True, "head_dense": True,
    "word_embedding": False, "position_embedding": False, "tokentype_embedding": False, "class_token": False,
    "relative_attention_bias": False,
    "bias": False, "norm_weight": False, "norm_bias": False, "residual_gate": False,
}


@dataclass(frozen=True)
class ParameterTag:
    """What a parameter is.

    Attributes:
        role: one of DECAYS, or a task's own, whose tag says whether it decays.
        full_shape: shape without tensor parallelism.
        std: standard deviation by block role, for example {"query": .1, "key": .1, "value": .2}; empty: a constant.
        constant: the value of a parameter that is not drawn.
        partition_dim: dimension that tensor parallelism slices; None: replicated.
        blocks: tensors stacked along dimension 0 that are sliced one by one (2 for the gate and up halves of a gated fc1).
        group_rows: rows of each block role within one group, where roles alternate group after group: (query, key, value) of a
            query group in query_key_value, (key, value) of a head in key_value.
        decays: whether weight decay applies; by the table for its roles, to be given for any other.

    Raises:
        ValueError: a role that is not in the table without `decays` (a slip of the pen would change the optimizer), or one of the
            table with another `decays`.
    """

    role: str
    full_shape: tuple[int, ...]
    std: dict[str, float]
    constant: float = 0.0
    partition_dim: int | None = None
    blocks: int = 1
    group_rows: tuple[int, ...] | None = None
    decays: bool | None = None

    def __post_init__(self) -> None:
        known = DECAYS.get(self.role, self.decays)
        if known is None:
            raise ValueError(f"no role {self.role!r} is known; take one of {', '.join(DECAYS)}, or say `decays` for a role of your own")
        if self.decays not in (None, known):
            raise ValueError(f"role {self.role} has decays={known} (megadsl.model.init.DECAYS); take another role")
        object.__setattr__(self, "decays", known)

    def draw(self, seed: int, name: str, rank: int = 0, size: int = 1) -> torch.Tensor:
        """The fp32 shard of tensor-parallel rank `rank` out of `size` that parameter `name` starts from.

        Equal to `shard` of the full tensor (rank 0 of 1), but only what the shard holds is drawn: the numbers of a role are a
        stream keyed by (seed, name, role) that runs along the dimension that is sliced, so every slice is one range of it.
        """
        shard = torch.empty(self.shard_shape(size))
        if not self.std:
            return shard.fill_(self.constant)
        if self.group_rows is not None:
            return self._draw_grouped(shard, seed, name, rank, size)
        rows = self.full_shape[0] // len(self.std)
        done = 0
        for index in self.slices(rank, size):
            for number, (role, std) in enumerate(self.std.items()):
                first, end = max(index[0].start, number * rows), min(index[0].stop, (number + 1) * rows)
                if first < end:
                    part = slice(first - number * rows, end - number * rows)
                    shape = (rows, *self.full_shape[1:])
                    shard[done:done + end - first] = self._draw_slice((part, *index[1:]), shape, std, _key(seed, name, role))
                    done += end - first
        return shard

    def _draw_grouped(self, shard: torch.Tensor, seed: int, name: str, rank: int, size: int) -> torch.Tensor:
        # Megatron stores, group after group, the queries of the group, its key head and its value head: [g*(n/g+2)*d, h];
        # in cross-attention, head after head, its key and its value: [n*2*d, h]. A rank holds whole groups.
        groups = self.full_shape[0] // sum(self.group_rows)
        first, end = groups * rank // size, groups * (rank + 1) // size
        by_group = shard.view(end - first, sum(self.group_rows), *self.full_shape[1:])
        done = 0
        for (role, std), rows in zip(self.std.items(), self.group_rows, strict=True):
            shape = (groups * rows, *self.full_shape[1:])
            drawn = self._draw_slice((slice(first * rows, end * rows),), shape, std, _key(seed, name, role))
            by_group[:, done:done + rows] = drawn.view(end - first, rows, *self.full_shape[1:])
            done += rows
        return shard

    def _draw_slice(self, index: tuple[slice, ...], shape: tuple[int, ...], std: float, key: int) -> torch.Tensor:
        """Slice `index` of the tensor of one role, of which only the dimension that is sliced may be cut."""
        dim = self.partition_dim or 0
        others = shape[:dim] + shape[dim + 1:]
        width, wanted = prod(others), index[dim]
        numbers = normal_numbers(key, wanted.start * width, (wanted.stop - wanted.start) * width, std)
        return torch.from_numpy(numbers).view(-1, *others).movedim(0, dim)

    def slices(self, rank: int, size: int) -> list[tuple[slice, ...]]:
        """Where the shard of a tensor-parallel rank lies in the full tensor: put together along dimension 0, in this order, the
        parts that these index are the shard."""
        if self.partition_dim is None:
            return [(slice(0, self.full_shape[0]),)]
        rows = self.full_shape[0] // self.blocks
        if self.partition_dim == 0:
            first, end = rows * rank // size, rows * (rank + 1) // size
            return [(slice(block * rows + first, block * rows + end),) for block in range(self.blocks)]
        uncut = [slice(0, length) for length in self.full_shape[:self.partition_dim]]
        length = self.full_shape[self.partition_dim]
        return [(*uncut, slice(length * rank // size, length * (rank + 1) // size))]

    def shard_shape(self, size: int) -> tuple[int, ...]:
        """Shape of the shard of one of `size` tensor-parallel ranks."""
        return tuple(
            length // size if dim == self.partition_dim else length for dim, length in enumerate(self.full_shape)
        )

    def shard(self, full: torch.Tensor, rank: int, size: int) -> torch.Tensor:
        """The slice of tensor-parallel rank `rank` out of `size`."""
        if size == 1:
            return full
        parts = [full[index] for index in self.slices(rank, size)]
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def unshard(self, shards: list[torch.Tensor]) -> torch.Tensor:
        """Inverse of `shard`: the full tensor from the slices of all tensor-parallel ranks."""
        if self.partition_dim is None or len(shards) == 1:
            return shards[0]
        by_block = zip(*(shard.chunk(self.blocks, dim=0) for shard in shards), strict=True)
        return torch.cat([torch.cat(pieces, dim=self.partition_dim) for pieces in by_block])


def tag(parameter: torch.nn.Parameter, value: ParameterTag) -> None:
    """Attach a tag, and tell Megatron-core and DeepSpeed whether the parameter is sliced or replicated."""
    parameter.megadsl_tag = value
    # Megatron sets these in its own initialisation, which is switched off; DeepSpeed counts a parameter once per
    # tensor-parallel group unless `tensor_model_parallel` is true. (It may be set already on biases.)
    for attribute in ("tensor_model_parallel", "partition_dim", "partition_stride"):
        if hasattr(parameter, attribute):
            delattr(parameter, attribute)
    sliced = value.partition_dim is not None
    set_tensor_model_parallel_attributes(parameter, sliced, value.partition_dim if sliced else -1, value.blocks)


def tag_norm(norm: torch.nn.Module, gain: float = 1.0) -> None:
    """Tag a LayerNorm or RMSNorm: it starts at `gain`, bias 0, replicated."""
    shape = tuple(norm.weight.shape)
    tag(norm.weight, ParameterTag("norm_weight", shape, {}, constant=gain))
    if getattr(norm, "bias", None) is not None:
        tag(norm.bias, ParameterTag("norm_bias", shape, {}))


def tag_of(name: str, parameter: torch.nn.Parameter) -> ParameterTag:
    """The tag of a parameter; an untagged one is a mistake of ours, never initialised by chance."""
    value = getattr(parameter, "megadsl_tag", None)
    if value is None:
        raise RuntimeError(f"parameter {name} has no role; tag it where it is made (megadsl.model.init.tag)")
    return value


def initialize(parameters: Iterable[tuple[str, torch.nn.Parameter]], seed: int, tensor_rank: int, tensor_size: int) -> None:
    """Fill (canonical name, parameter) pairs in place, with as many threads as torch has; they do not change the numbers."""

    @torch.no_grad()
    def fill(pair: tuple[str, torch.nn.Parameter]) -> None:
        name, parameter = pair
        parameter.copy_(tag_of(name, parameter).draw(seed, name, tensor_rank, tensor_size))

    drawn = []
    for name, parameter in parameters:
        if tag_of(name, parameter).std:
            drawn.append((name, parameter))
        else:
            fill((name, parameter))
    threads = torch.get_num_threads()
    with ThreadPoolExecutor(threads) as pool:
        torch.set_num_threads(1)  # for the copies in each of these threads
        try:
            # Raises what a thread raised. A pool of one thread is a detour, felt at a thousand narrow layers.
            list(pool.map(fill, drawn) if threads > 1 else map(fill, drawn))
        finally:
            torch.set_num_threads(threads)


@torch.no_grad()
def leave_to_checkpoint(parameters: Iterable[tuple[str, torch.nn.Parameter]]) -> None:
    """Instead of `initialize`, where a checkpoint follows: nothing is drawn. What the checkpoint then leaves out stays NaN, and
    shows in the first loss."""
    for name, parameter in parameters:
        tag_of(name, parameter)
        parameter.fill_(torch.nan)


def _key(seed: int, name: str, role: str) -> int:
    return key_from(seed, "init", name, role)
