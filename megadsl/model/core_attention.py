"""Core attention on torch's scaled_dot_product_attention, which picks a fused kernel where there is one, and
cross-attention over the encoder's memory.

The core replaces Megatron-core's DotProductAttention through the layer spec; the projections stay Megatron's.
Shape letters: s query length, t key length, b micro-batch, n heads and g query groups of this rank, d head size.
"""

import copy

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.transformer.attention import CrossAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.torch_norm import WrappedTorchNorm


class ScaledDotProductAttention(torch.nn.Module):
    """softmax(q k^T / sqrt(d) + bias) v, causal or with a boolean mask (True: masked out)."""

    def __init__(self, config, layer_number, attn_mask_type, attention_type, cp_comm_type=None, softmax_scale=None,
                 pg_collection=None):
        super().__init__()
        self.dropout = config.attention_dropout
        self.softmax_scale = softmax_scale

    def forward(self, query, key, value, attention_mask, /, *, attn_mask_type=None, attention_bias=None,
                packed_seq_params=None):
        """query [s, b, n, d], key and value [t, b, g, d], mask [b or 1, 1, s, t], bias [1, n, s, t] -> [s, b, n * d]."""
        if packed_seq_params is not None:
            raise NotImplementedError("Megatron's packed sequences are not supported; segments are (megadsl/model/masks.py)")
        dropout = self.dropout if self.training else 0.0
        mask = None if attention_mask is None else ~attention_mask
        if attention_bias is not None:
            mask = attention_bias if mask is None else attention_bias.masked_fill(attention_mask, -torch.inf)
        arguments = dict(
            attn_mask=mask, is_causal=mask is None and attn_mask_type == AttnMaskType.causal and query.size(0) > 1,
            scale=self.softmax_scale, enable_gqa=query.size(2) != key.size(2),
        )
        q, k, v = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
        if dropout:
            # Heads are sharded over tensor-parallel ranks, so their masks must differ from rank to rank.
            with tensor_parallel.get_cuda_rng_tracker().fork():
                context = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, **arguments)
        else:
            context = F.scaled_dot_product_attention(q, k, v, **arguments)
        return context.permute(2, 0, 1, 3).flatten(2)


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
