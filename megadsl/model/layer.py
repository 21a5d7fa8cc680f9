"""One transformer layer: the plan's numbers -> TransformerLayerSubmodules -> Megatron-core's own TransformerLayer.

Shape letters: s sequence, b micro-batch, h hidden, f FFN size, n heads, g query groups, d head size.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.transformer import ModuleSpec, TransformerConfig, TransformerLayer, TransformerLayerSubmodules
from megatron.core.transformer.attention import CrossAttentionSubmodules, SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.torch_norm import WrappedTorchNorm

from megadsl.config.model import ModelConfig
from megadsl.model.activations import Activations
from megadsl.model.core_attention import MemoryAttention, ScaledDotProductAttention
from megadsl.model.init import ParameterTag, tag, tag_norm
from megadsl.model.masks import Mask
from megadsl.model.precision import DTYPES
from megadsl.model.residual import ResidualConnection
from megadsl.parallel.device import on_gpu
from megadsl.schemes.plan import SublayerPlan


def _squared_relu(x: torch.Tensor) -> torch.Tensor:
    return F.relu(x).square()


ACTIVATIONS = {
    "relu": F.relu, "gelu": F.gelu, "tanh_gelu": partial(F.gelu, approximate="tanh"), "silu": F.silu,
    "squared_relu": _squared_relu, "swiglu": F.silu, "geglu": F.gelu,
}


def transformer_config(model: ModelConfig, tensor_parallel_size: int = 1, precision: str = "fp32") -> TransformerConfig:
    """Megatron-core's view of our model section. Its initialisation is off: megadsl.model.init fills every parameter."""
    dtype = DTYPES[precision]
    return TransformerConfig(
        num_layers=model.num_layers, hidden_size=model.hidden_size, ffn_hidden_size=model.ffn_size,
        num_attention_heads=model.num_attention_heads, num_query_groups=model.query_groups, kv_channels=model.head_dim,
        hidden_dropout=model.hidden_dropout, attention_dropout=model.attention_dropout,
        normalization=model.normalization, layernorm_epsilon=model.layernorm_epsilon,
        add_bias_linear=model.add_bias_linear, gated_linear_unit=model.gated,
        activation_func=ACTIVATIONS[model.activation], qk_layernorm=model.qk_layernorm,
        tensor_model_parallel_size=tensor_parallel_size,
        # DeepSpeed cuts the pipeline. A value above 1 here would shift the global layer numbers that we give.
        pipeline_model_parallel_size=1, pipeline_dtype=dtype, params_dtype=dtype,
        fp16=precision == "fp16", bf16=precision == "bf16",
        use_cpu_initialization=True, perform_initialization=False,
        # The fused kernels are compiled for the GPU; megatron's fused GELU is the tanh approximation, so it stays off.
        bias_dropout_fusion=on_gpu(), bias_activation_fusion=False,
    )


def layer_submodules(model: ModelConfig, config: TransformerConfig, sublayers: list[SublayerPlan], norm_position: str,
                     causal: bool) -> TransformerLayerSubmodules:
    """The spec of one layer. Every layer gets its own object, because TransformerLayer may rewrite it."""
    by_kind = {sublayer.kind: sublayer for sublayer in sublayers}
    qk_norm = WrappedTorchNorm if model.qk_layernorm else None
    core_attention = ModuleSpec(module=ScaledDotProductAttention, params={"softcap": model.attention_logit_softcap})
    make_norm = partial(_tagged_norm, config) if norm_position in ("post", "both") else None

    def norm_of(kind: str):
        if norm_position in ("post", "none"):
            return IdentityOp
        scale = by_kind[kind].norm_scale
        return WrappedTorchNorm if scale == 1.0 else ModuleSpec(module=ScaledNorm, params={"scale": scale})

    def addition(kind: str) -> ModuleSpec:
        plan = by_kind[kind]
        return ModuleSpec(module=ResidualConnection, params={
            "residual_scale": plan.residual_scale, "branch_scale": plan.branch_scale, "gate": plan.gate,
            "hidden_size": model.hidden_size, "make_norm": make_norm,
        })

    cross = {} if "cross_attention" not in by_kind else {
        "pre_cross_attn_layernorm": norm_of("cross_attention"),
        "cross_attention": ModuleSpec(
            module=MemoryAttention, params={"qk_layernorm": model.qk_layernorm},
            submodules=CrossAttentionSubmodules(
                linear_q=tensor_parallel.ColumnParallelLinear, linear_kv=tensor_parallel.ColumnParallelLinear,
                core_attention=core_attention, linear_proj=tensor_parallel.RowParallelLinear,
            ),
        ),
        "cross_attn_bda": addition("cross_attention"),
    }
    return TransformerLayerSubmodules(
        input_layernorm=norm_of("self_attention"),
        self_attention=ModuleSpec(
            module=SelfAttention,
            params={"attn_mask_type": AttnMaskType.causal if causal else AttnMaskType.padding},
            submodules=SelfAttentionSubmodules(
                linear_qkv=tensor_parallel.ColumnParallelLinear, core_attention=ScaledDotProductAttention,
                linear_proj=tensor_parallel.RowParallelLinear, q_layernorm=qk_norm, k_layernorm=qk_norm,
            ),
        ),
        self_attn_bda=addition("self_attention"),
        pre_mlp_layernorm=norm_of("ffn"),
        mlp=ModuleSpec(
            module=MLP,
            submodules=MLPSubmodules(
                linear_fc1=tensor_parallel.ColumnParallelLinear, linear_fc2=tensor_parallel.RowParallelLinear
            ),
        ),
        mlp_bda=addition("ffn"),
        **cross,
    )


class ScaledNorm(torch.nn.Module):
    """scale * norm(x): the fixed factor of LayerNorm Scaling (arXiv 2502.05795)."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float, scale: float):
        super().__init__()
        self.norm = WrappedTorchNorm(config, hidden_size, eps)
        self.scale = scale

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.norm(hidden) * self.scale


class Layer(torch.nn.Module):
    """Activations with a new hidden state: a TransformerLayer as one item of a model's list.

    Args:
        masks: activations -> (mask of self-attention, mask of cross-attention); shared by the layers of a stack.
        rotary: length -> rotary angles; None for other positions.
    """

    def __init__(self, model: ModelConfig, config: TransformerConfig, index: int, sublayers: list[SublayerPlan],
                 norm_position: str, causal: bool, masks: Callable, rotary: Callable | None, recompute: bool):
        super().__init__()
        self.masks, self.rotary, self.recompute = masks, rotary, recompute
        submodules = layer_submodules(model, config, sublayers, norm_position, causal)
        self.layer = TransformerLayer(config, submodules, layer_number=index + 1)
        _tag_layer(self.layer, model, sublayers)

    def attentions(self) -> list[torch.nn.Module]:
        """Megatron's self-attention, and its cross-attention where the layer has one."""
        both = self.layer.self_attention, self.layer.cross_attention
        return [attention for attention in both if not isinstance(attention, IdentityOp)]

    def forward(self, value: Activations, inference_context=None) -> Activations:
        masks, hidden, memory = self.masks(value), value.hidden, value.get("memory")
        if not (self.recompute and self.training):
            return value.replace(hidden=self._run(hidden, memory, *masks, inference_context))
        # Megatron's checkpoint, not torch's: it restores the tensor-parallel generators, so dropout masks are drawn again.
        # Attention masks are given to it, so that they are not made again. It takes tensors only: a BlockMask is bound.
        tensors = [one if isinstance(one, torch.Tensor) else None for one in masks]
        run = partial(self._run_again, [None if isinstance(one, torch.Tensor) else one for one in masks])
        return value.replace(hidden=tensor_parallel.checkpoint(run, False, hidden, memory, *tensors))

    def _run_again(self, bound: list[Mask | None], hidden: torch.Tensor, memory: torch.Tensor | None, *tensors) -> torch.Tensor:
        return self._run(hidden, memory, *(tensor if one is None else one for one, tensor in zip(bound, tensors, strict=True)))

    def _run(self, hidden: torch.Tensor, memory: torch.Tensor | None, mask: Mask | None, memory_mask: Mask | None,
             inference_context=None) -> torch.Tensor:
        length = hidden.size(0) if inference_context is None else inference_context.max_sequence_length
        return self.layer(
            hidden, attention_mask=mask, context=memory, context_mask=memory_mask,
            rotary_pos_emb=None if self.rotary is None else self.rotary(length), inference_context=inference_context,
        )[0]


def _tagged_norm(config: TransformerConfig) -> torch.nn.Module:
    norm = WrappedTorchNorm(config, config.hidden_size, config.layernorm_epsilon)
    tag_norm(norm)
    return norm


def _tag_layer(layer: TransformerLayer, model: ModelConfig, sublayers: list[SublayerPlan]) -> None:
    std = {sublayer.kind: sublayer.weight_std for sublayer in sublayers}
    h, f, d, n = model.hidden_size, model.ffn_size * (2 if model.gated else 1), model.head_dim, model.num_attention_heads
    heads_per_group = n // model.query_groups
    qkv_rows = model.query_groups * (heads_per_group + 2) * d

    for norm in (layer.input_layernorm, layer.pre_cross_attn_layernorm, layer.pre_mlp_layernorm):
        norm = norm.norm if isinstance(norm, ScaledNorm) else norm
        if hasattr(norm, "weight"):
            tag_norm(norm)
    weights = std["self_attention"]
    _tag_attention(layer.self_attention, (h, n * d), weights["attention_output"])
    _tag_linear(layer.self_attention.linear_qkv, ParameterTag(
        "query_key_value", (qkv_rows, h), {role: weights[role] for role in ("query", "key", "value")},
        partition_dim=0, group_rows=(heads_per_group * d, d, d),
    ))
    if "cross_attention" in std:
        weights = std["cross_attention"]
        _tag_attention(layer.cross_attention, (h, n * d), weights["attention_output"])
        _tag_linear(layer.cross_attention.linear_q, ParameterTag(
            "query", (n * d, h), {"query": weights["query"]}, partition_dim=0,
        ))
        _tag_linear(layer.cross_attention.linear_kv, ParameterTag(
            "key_value", (2 * n * d, h), {role: weights[role] for role in ("key", "value")}, partition_dim=0, group_rows=(d, d),
        ))
    fc1 = std["ffn"]["fc1"]
    _tag_linear(layer.mlp.linear_fc1, ParameterTag(
        "fc1", (f, h), {"gate": fc1, "up": fc1} if model.gated else {"fc1": fc1},
        partition_dim=0, blocks=2 if model.gated else 1,
    ))
    _tag_linear(layer.mlp.linear_fc2, ParameterTag("fc2", (h, model.ffn_size), {"fc2": std["ffn"]["fc2"]}, partition_dim=1))


def _tag_attention(attention: torch.nn.Module, shape: tuple[int, int], output_std: float) -> None:
    for norm in (attention.q_layernorm, attention.k_layernorm):
        if norm is not None:
            tag_norm(norm)
    _tag_linear(attention.linear_proj, ParameterTag(
        "attention_output", shape, {"attention_output": output_std}, partition_dim=1,
    ))


def _tag_linear(linear: torch.nn.Module, weight: ParameterTag) -> None:
    tag(linear.weight, weight)
    if linear.bias is not None:
        # A bias follows the output features: sliced with the rows of a column-parallel matrix, replicated otherwise.
        bias_dim = 0 if weight.partition_dim == 0 else None
        tag(linear.bias, ParameterTag("bias", weight.full_shape[:1], {}, partition_dim=bias_dim, blocks=weight.blocks))
