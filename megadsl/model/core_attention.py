"""Core attention on torch's scaled_dot_product_attention, which picks a fused kernel where there is one, or on flex_attention
where the mask is a BlockMask (masks.py chooses), and cross-attention over the encoder's memory.

The core replaces Megatron-core's DotProductAttention through the layer spec; the projections stay Megatron's. Soft-capped scores
(Gemma 2, arXiv 2408.00118) are nothing that SDPA knows: flex_attention takes them on, elsewhere they are written out. The largest
score of every head, which QK-clip asks for (training/qk_clip.py), is nothing that any kernel of torch gives: it costs a second
product of queries and keys.
Shape letters: s query length, t key length, b micro-batch, n heads and g query groups of this rank, d head size.
"""

import copy
from contextlib import nullcontext
from functools import cache, partial

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.transformer.attention import CrossAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from megadsl.model.masks import Mask, visible


# Queries whose scores the search for the largest one holds at a time.
SEARCHED_QUERIES = 256


class ScaledDotProductAttention(torch.nn.Module):
    """softmax(cap(q k^T / sqrt(d)) + mask) v; without a mask causal or full, as the layer's kind of attention is.

    Attributes:
        softcap: c of cap(score) = c tanh(score / c), in front of mask and bias; 0: scores stay as they are.
        largest_scores: [n] the largest visible score (before any cap) of every head in the forward passes of training since they
            were last set; None: not measured.
    """

    def __init__(self, config, layer_number, attn_mask_type, attention_type, cp_comm_type=None, softmax_scale=None,
                 pg_collection=None, softcap: float = 0.0):
        super().__init__()
        self.dropout = config.attention_dropout
        self.softmax_scale = softmax_scale
        self.softcap = softcap
        self.largest_scores: torch.Tensor | None = None

    def forward(self, query, key, value, attention_mask, /, *, attn_mask_type=None, attention_bias=None,
                packed_seq_params=None):
        """query [s, b, n, d], key and value [t, b, g, d], mask a BlockMask or added to scores [b, n, s, t] -> [s, b, n * d]."""
        if packed_seq_params is not None:
            raise NotImplementedError("Megatron's packed sequences are not supported; segments are (megadsl/model/masks.py)")
        if attention_bias is not None:
            raise NotImplementedError("a bias on scores is part of the mask (megadsl/model/masks.py)")
        dropout = self.dropout if self.training else 0.0
        q, k, v = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
        is_causal = attention_mask is None and attn_mask_type == AttnMaskType.causal and query.size(0) > 1
        if self.largest_scores is not None and self.training:
            found = largest_scores(q, k, attention_mask, is_causal, self.softmax_scale)
            torch.maximum(self.largest_scores, found, out=self.largest_scores)
        arguments = {"scale": self.softmax_scale, "enable_gqa": query.size(2) != key.size(2)}
        if isinstance(attention_mask, BlockMask):
            score_mod = capped_score(self.softcap) if self.softcap else None
            context = _blockwise(q, k, v, score_mod=score_mod, block_mask=attention_mask, **arguments)
            return context.permute(2, 0, 1, 3).flatten(2)
        if self.softcap:
            context = partial(_written_out, q, k, v, attention_mask, is_causal, self.softmax_scale, self.softcap)
        else:
            context = partial(F.scaled_dot_product_attention, q, k, v, attn_mask=attention_mask, is_causal=is_causal, **arguments)
        # Heads are sharded over tensor-parallel ranks, so their dropout masks must differ from rank to rank.
        with tensor_parallel.get_cuda_rng_tracker().fork() if dropout else nullcontext():
            return context(dropout_p=dropout).permute(2, 0, 1, 3).flatten(2)


def _scores(query: torch.Tensor, key: torch.Tensor, scale: float | None) -> torch.Tensor:
    """[b, n, s, d], [b, g, t, d] -> q k^T times scale (None: 1/sqrt(d)) in fp32, [b, n, s, t]."""
    groups = key.size(1)
    products = query.unflatten(1, (groups, -1)) @ key.unsqueeze(2).mT
    return products.flatten(1, 2).float() * (query.size(-1) ** -0.5 if scale is None else scale)


def _future(queries: int, keys: int, device: torch.device, first: int = 0) -> torch.Tensor:
    """[s, t] true where the key comes after the query; `first` is the position of the first query."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).triu(first + 1)


def _written_out(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, is_causal: bool,
                 scale: float | None, softcap: float, dropout_p: float) -> torch.Tensor:
    """Attention of capped scores, every score of it in memory: [b, n, s, d]."""
    scores = softcap * torch.tanh(_scores(query, key, scale) / softcap)
    if is_causal:
        scores = scores.masked_fill(_future(*scores.shape[-2:], scores.device), -torch.inf)
    elif mask is not None:
        scores = scores + mask
    weights = F.dropout(scores.softmax(dim=-1).to(value.dtype), dropout_p)
    return (weights.unflatten(1, (value.size(1), -1)) @ value.unsqueeze(2)).flatten(1, 2)


@torch.no_grad()
def largest_scores(query: torch.Tensor, key: torch.Tensor, mask: Mask | None, is_causal: bool, scale: float | None) -> torch.Tensor:
    """The largest score of every head among those that the mask leaves visible, a bias not counted: [n] in fp32."""
    found = []
    for first in range(0, query.size(2), SEARCHED_QUERIES):
        scores = _scores(query[:, :, first:first + SEARCHED_QUERIES], key, scale)
        rows = slice(first, first + scores.size(2))
        if isinstance(mask, BlockMask):
            hidden = ~visible(mask.mask_mod, query.size(0), scores.size(2), scores.size(3), query.device, first)
        elif mask is not None:
            hidden = (mask if mask.size(2) == 1 else mask[:, :, rows]) == -torch.inf
        elif is_causal:
            hidden = _future(*scores.shape[-2:], query.device, first)
        else:
            hidden = None
        found.append((scores if hidden is None else scores.masked_fill(hidden, -torch.inf)).amax(dim=(0, 2, 3)))
    return torch.stack(found).amax(dim=0)


@cache
def capped_score(softcap: float):
    """flex_attention's score_mod for one cap: the same function for all layers, so that they share a compiled kernel."""
    def score_mod(score, sequence, head, query, key):
        return softcap * torch.tanh(score / softcap)

    return score_mod


def _blockwise(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **arguments) -> torch.Tensor:
    # Compiled it is one kernel; as it stands it writes every score out, which a CPU does for the tests.
    attend = _compiled_flex_attention() if query.is_cuda else flex_attention
    return attend(query, key, value, **arguments)


@cache
def _compiled_flex_attention():
    return torch.compile(flex_attention)


class MemoryAttention(CrossAttention):
    """Megatron-core's cross-attention with QK-norm, and beside a grouped-query self-attention (it has a key head per head)."""

    def __init__(self, config, submodules, layer_number, qk_layernorm: bool = False, **arguments):
        if config.num_query_groups != config.num_attention_heads:
            config = copy.copy(config)
            config.num_query_groups = config.num_attention_heads
        super().__init__(config, submodules, layer_number, **arguments)
        norm = (lambda: WrappedTorchNorm(config, config.kv_channels, config.layernorm_epsilon)) if qk_layernorm else lambda: None
        self.q_layernorm, self.k_layernorm = norm(), norm()
        self._kept: dict[int, tuple[torch.Tensor, torch.Tensor]] | None = None

    def forward(self, hidden_states, attention_mask, inference_context=None, **arguments):
        # Megatron's cache is for keys of tokens that come one after the other; the memory is all there from the first on.
        self._kept = None if inference_context is None else inference_context.memory
        try:
            return super().forward(hidden_states, attention_mask, inference_context=None, **arguments)
        finally:
            self._kept = None

    def get_query_key_value_tensors(self, hidden_states, key_value_states, **arguments):
        if self._kept is not None and self.layer_number in self._kept:
            query = self.linear_q(hidden_states)[0].unflatten(-1, (-1, self.hidden_size_per_attention_head))
            return (query if self.q_layernorm is None else self.q_layernorm(query)), *self._kept[self.layer_number]
        query, key, value = super().get_query_key_value_tensors(hidden_states, key_value_states, **arguments)
        if self.q_layernorm is not None:
            query, key = self.q_layernorm(query), self.k_layernorm(key)
        if self._kept is not None:
            self._kept[self.layer_number] = key, value
        return query, key, value
