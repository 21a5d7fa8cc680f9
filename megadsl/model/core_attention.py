"""Core attention on torch's scaled_dot_product_attention, which picks a fused kernel where there is one, or on flex_attention
where the mask is a BlockMask (masks.py chooses), and cross-attention over the encoder's memory.

The core replaces Megatron-core's DotProductAttention through the layer spec; the projections stay Megatron's.
Shape letters: s query length, t key length, b micro-batch, n heads and g query groups of this rank, d head size.
"""

import copy
from functools import cache

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.transformer.attention import CrossAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from torch.nn.attention.flex_attention import BlockMask, flex_attention


class ScaledDotProductAttention(torch.nn.Module):
    """softmax(q k^T / sqrt(d) + mask) v; without a mask causal or full, as the layer's kind of attention is."""

    def __init__(self, config, layer_number, attn_mask_type, attention_type, cp_comm_type=None, softmax_scale=None,
                 pg_collection=None):
        super().__init__()
        self.dropout = config.attention_dropout
        self.softmax_scale = softmax_scale

    def forward(self, query, key, value, attention_mask, /, *, attn_mask_type=None, attention_bias=None,
                packed_seq_params=None):
        """query [s, b, n, d], key and value [t, b, g, d], mask a BlockMask or added to scores [b, n, s, t] -> [s, b, n * d]."""
        if packed_seq_params is not None:
            raise NotImplementedError("Megatron's packed sequences are not supported; segments are (megadsl/model/masks.py)")
        if attention_bias is not None:
            raise NotImplementedError("a bias on scores is part of the mask (megadsl/model/masks.py)")
        dropout = self.dropout if self.training else 0.0
        q, k, v = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
        arguments = {"scale": self.softmax_scale, "enable_gqa": query.size(2) != key.size(2)}
        if isinstance(attention_mask, BlockMask):
            return _blockwise(q, k, v, block_mask=attention_mask, **arguments).permute(2, 0, 1, 3).flatten(2)
        arguments["attn_mask"] = attention_mask
        arguments["is_causal"] = attention_mask is None and attn_mask_type == AttnMaskType.causal and query.size(0) > 1
        if dropout:
            # Heads are sharded over tensor-parallel ranks, so their masks must differ from rank to rank.
            with tensor_parallel.get_cuda_rng_tracker().fork():
                context = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, **arguments)
        else:
            context = F.scaled_dot_product_attention(q, k, v, **arguments)
        return context.permute(2, 0, 1, 3).flatten(2)


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

    def forward(self, hidden_states, attention_mask, inference_context=None, **arguments):
        # The context caches keys of tokens that come one after the other; the memory is all there from the first on.
        return super().forward(hidden_states, attention_mask, inference_context=None, **arguments)

    def get_query_key_value_tensors(self, hidden_states, key_value_states, **arguments):
        query, key, value = super().get_query_key_value_tensors(hidden_states, key_value_states, **arguments)
        if self.q_layernorm is not None:
            query, key = self.q_layernorm(query), self.k_layernorm(key)
        return query, key, value
