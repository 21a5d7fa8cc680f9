"""Initialisation in one pass after construction, keyed by (seed, parameter name, role) and independent of the layout.

Every parameter is tagged where it is made with its role, its standard deviation (from the SignalPlan) and how tensor
parallelism slices it. The full tensor is drawn on the CPU in fp32 and this rank's slice is copied in, so that every
layout starts from bit-equal weights. The same tags serve the optimizer (which roles decay) and checkpoints (unsharding).

Shape letters: h hidden, n heads, g query groups, d head size, f FFN size.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes

from megadsl.parallel.rng import seed_from

# Every role of a parameter of the trunk and the language heads, and whether weight decay pulls it towards zero: matrices; on norms,
# biases, embeddings and gates the field does without it. query_key_value is self-attention's, query and key_value cross-attention's.
DECAYS = {
    "query_key_value": True, "query": True, "key_value": True, "attention_output": True, "fc1": True, "fc2": True,
    "output_head": True, "head_dense": True,
    "word_embedding": False, "position_embedding": False, "tokentype_embedding": False, "relative_attention_bias": False,
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

    def draw(self, seed: int, name: str) -> torch.Tensor:
        """The full fp32 tensor that parameter `name` starts from."""
        if not self.std:
            return torch.full(self.full_shape, self.constant)
        if self.group_rows is not None:
            return self._draw_grouped(seed, name)
        parts = [
            _normal((self.full_shape[0] // len(self.std), *self.full_shape[1:]), std, seed, name, role)
            for role, std in self.std.items()
        ]
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def _draw_grouped(self, seed: int, name: str) -> torch.Tensor:
        # Megatron stores, group after group, the queries of the group, its key head and its value head: [g*(n/g+2)*d, h];
        # in cross-attention, head after head, its key and its value: [n*2*d, h].
        groups = self.full_shape[0] // sum(self.group_rows)
        parts = [
            _normal((groups * rows, self.full_shape[1]), std, seed, name, role).view(groups, rows, -1)
            for (role, std), rows in zip(self.std.items(), self.group_rows, strict=True)
        ]
        return torch.cat(parts, dim=1).reshape(self.full_shape)

    def shard(self, full: torch.Tensor, rank: int, size: int) -> torch.Tensor:
        """The slice of tensor-parallel rank `rank` out of `size`."""
        if self.partition_dim is None or size == 1:
            return full
        pieces = [block.chunk(size, dim=self.partition_dim)[rank] for block in full.chunk(self.blocks, dim=0)]
        return torch.cat(pieces) if len(pieces) > 1 else pieces[0]

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


@torch.no_grad()
def initialize(parameters: Iterable[tuple[str, torch.nn.Parameter]], seed: int, tensor_rank: int, tensor_size: int) -> None:
    """Fill (canonical name, parameter) pairs in place."""
    for name, parameter in parameters:
        value = tag_of(name, parameter)
        parameter.copy_(value.shard(value.draw(seed, name), tensor_rank, tensor_size))


def _normal(shape: tuple[int, ...], std: float, seed: int, name: str, role: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed_from(seed, "init", name, role))
    return torch.empty(shape).normal_(0.0, std, generator=generator)
