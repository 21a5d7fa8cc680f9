"""LlamaForCausalLM: a Pre-LN decoder with RMSNorm, rotary positions, a gated FFN and grouped queries (arXiv 2302.13971)."""

from megadsl.checkpoint.huggingface.architecture import ACTIVATIONS, Architecture, only, our_activation
from megadsl.checkpoint.huggingface.mapping import TensorMap
from megadsl.config.model import ModelConfig
from megadsl.errors import UserError


def _settings(model: ModelConfig) -> dict:
    return {
        "hidden_size": model.hidden_size, "intermediate_size": model.ffn_size, "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads, "num_key_value_heads": model.query_groups, "head_dim": model.head_dim,
        "hidden_act": ACTIVATIONS[model.activation], "max_position_embeddings": model.seq_length,
        "rms_norm_eps": model.layernorm_epsilon, "rope_theta": model.rotary_base,
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rotary_base},
        "attention_bias": model.add_bias_linear, "mlp_bias": model.add_bias_linear, "attention_dropout": model.attention_dropout,
        "tie_word_embeddings": not model.untie_embeddings_and_output_weights,
    }


def _section(values: dict) -> dict:
    only(values, pretraining_tp=1)
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        raise UserError(f"config.json scales its rotary positions ({rope}), which has no counterpart here.")
    bias = values.get("attention_bias", False)
    only(values, mlp_bias=bias)
    return {
        "family": "decoder", "norm_position": "pre", "normalization": "RMSNorm", "position_embedding_type": "rope",
        "num_layers": values["num_hidden_layers"], "hidden_size": values["hidden_size"],
        "num_attention_heads": values["num_attention_heads"], "ffn_hidden_size": values["intermediate_size"],
        "num_query_groups": values.get("num_key_value_heads") or values["num_attention_heads"],
        "kv_channels": values.get("head_dim") or values["hidden_size"] // values["num_attention_heads"],
        "seq_length": values["max_position_embeddings"], "activation": our_activation(values.get("hidden_act", "silu"), gated=True),
        "layernorm_epsilon": values.get("rms_norm_eps", 1e-6), "add_bias_linear": bias,
        "rotary_base": rope.get("rope_theta") or values.get("rope_theta", 10000.0),
        "untie_embeddings_and_output_weights": not values.get("tie_word_embeddings", False),
        "attention_dropout": values.get("attention_dropout", 0.0),
    }


def _tensors(tensors: TensorMap, values: dict) -> None:
    model, h = tensors.model, tensors.model.hidden_size
    tensors.vocabulary("embedding.word.table.weight", "model.embed_tokens.weight")
    for index in range(model.num_layers):
        ours, theirs = f"decoder.{index}", f"model.layers.{index}"
        attention, mlp = f"{theirs}.self_attn", f"{theirs}.mlp"
        tensors.norm(f"{ours}.input_layernorm", f"{theirs}.input_layernorm")
        tensors.query_key_value(f"{ours}.self_attention.linear_qkv", tuple(f"{attention}.{part}_proj" for part in "qkv"))
        tensors.linear(f"{ours}.self_attention.linear_proj", f"{attention}.o_proj", h)
        tensors.norm(f"{ours}.pre_mlp_layernorm", f"{theirs}.post_attention_layernorm")
        tensors.gate_up(f"{ours}.mlp.linear_fc1", (f"{mlp}.gate_proj", f"{mlp}.up_proj"))
        tensors.linear(f"{ours}.mlp.linear_fc2", f"{mlp}.down_proj", h)
    tensors.norm("final_norm", "model.norm")
    if model.untie_embeddings_and_output_weights:
        tensors.vocabulary("output_head.linear.weight", "lm_head.weight")


LLAMA = Architecture(
    "LlamaForCausalLM", "llama",
    takes={
        "family": ("decoder",), "norm_position": ("pre",), "normalization": ("RMSNorm",), "position_embedding_type": ("rope",),
        "qk_layernorm": (False,), "embedding_layernorm": (False,), "activation": ("swiglu", "geglu"),
    },
    settings=_settings, tensors=_tensors, section=_section, biases=lambda model: model.add_bias_linear, grouped_queries=True,
    free_head_size=True,
)
