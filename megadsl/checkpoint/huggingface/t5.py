"""T5ForConditionalGeneration: Pre-LN with RMSNorm, relative positions, no biases, no division of scores (arXiv 1910.10683).

Its scores are q k without 1/sqrt(d), which therefore goes into q; a tied head divides by sqrt(h), which goes into the final norm.
"""

import math

from megadsl.checkpoint.huggingface.architecture import ACTIVATIONS, Architecture, our_activation
from megadsl.checkpoint.huggingface.mapping import TensorMap
from megadsl.config.model import ModelConfig


def _settings(model: ModelConfig) -> dict:
    activation = ACTIVATIONS[model.activation]
    if model.gated:
        # "gated-gelu" means the tanh approximation here; this is the exact one under another name.
        activation = "gated-gelu_python" if model.activation == "geglu" else f"gated-{activation}"
    return {
        "d_model": model.hidden_size, "d_kv": model.head_dim, "d_ff": model.ffn_size, "num_layers": model.num_layers,
        "num_decoder_layers": model.decoder_layers, "num_heads": model.num_attention_heads, "feed_forward_proj": activation,
        "relative_attention_num_buckets": model.relative_attention_num_buckets,
        "relative_attention_max_distance": model.relative_attention_max_distance, "n_positions": model.seq_length,
        "layer_norm_epsilon": model.layernorm_epsilon, "dropout_rate": model.hidden_dropout, "is_encoder_decoder": True,
        "tie_word_embeddings": not model.untie_embeddings_and_output_weights,
    }


def _section(values: dict) -> dict:
    form, _, activation = values.get("feed_forward_proj", "relu").rpartition("-")
    if (form, activation) == ("gated", "gelu"):
        activation = "gelu_new"
    return {
        "family": "encoder_decoder", "norm_position": "pre", "normalization": "RMSNorm", "position_embedding_type": "relative",
        "num_layers": values["num_layers"], "num_decoder_layers": values.get("num_decoder_layers") or values["num_layers"],
        "hidden_size": values["d_model"], "num_attention_heads": values["num_heads"], "kv_channels": values["d_kv"],
        "ffn_hidden_size": values["d_ff"], "seq_length": values.get("n_positions", 512),
        "activation": our_activation(activation, form == "gated"), "layernorm_epsilon": values.get("layer_norm_epsilon", 1e-6),
        "relative_attention_num_buckets": values.get("relative_attention_num_buckets", 32),
        "relative_attention_max_distance": values.get("relative_attention_max_distance", 128), "add_bias_linear": False,
        "untie_embeddings_and_output_weights": not values.get("scale_decoder_outputs", values.get("tie_word_embeddings", True)),
        "hidden_dropout": values.get("dropout_rate", 0.1),
    }


def _tensors(tensors: TensorMap, values: dict) -> None:
    model = tensors.model
    tensors.vocabulary("embedding.word.table.weight", "shared.weight")
    for stack, layers in (("encoder", model.num_layers), ("decoder", model.decoder_layers)):
        tensors.tensor(f"{stack}.relative_position.relative_attention_bias.weight",
                       f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight")
        for index in range(layers):
            _layer(tensors, f"{stack}.{index}", f"{stack}.block.{index}.layer", stack == "decoder")
    tied = not model.untie_embeddings_and_output_weights
    tensors.norm("encoder.final_norm", "encoder.final_layer_norm")
    tensors.norm("final_norm", "decoder.final_layer_norm", math.sqrt(model.hidden_size) if tied else 1.0)
    if not tied:
        tensors.vocabulary("output_head.linear.weight", "lm_head.weight")


def _layer(tensors: TensorMap, ours: str, theirs: str, cross: bool) -> None:
    model, h, scale = tensors.model, tensors.model.hidden_size, tensors.model.head_dim ** -0.5
    attention = f"{theirs}.0.SelfAttention"
    tensors.norm(f"{ours}.input_layernorm", f"{theirs}.0.layer_norm")
    tensors.query_key_value(f"{ours}.self_attention.linear_qkv", tuple(f"{attention}.{part}" for part in "qkv"), scale)
    tensors.linear(f"{ours}.self_attention.linear_proj", f"{attention}.o", h)
    if cross:
        attention = f"{theirs}.1.EncDecAttention"
        tensors.norm(f"{ours}.pre_cross_attn_layernorm", f"{theirs}.1.layer_norm")
        tensors.tensor(f"{ours}.cross_attention.linear_q.weight", f"{attention}.q.weight", scale)
        tensors.key_value(f"{ours}.cross_attention.linear_kv", (f"{attention}.k", f"{attention}.v"))
        tensors.linear(f"{ours}.cross_attention.linear_proj", f"{attention}.o", h)
    last = f"{theirs}.{2 if cross else 1}"
    tensors.norm(f"{ours}.pre_mlp_layernorm", f"{last}.layer_norm")
    if model.gated:
        tensors.gate_up(f"{ours}.mlp.linear_fc1", (f"{last}.DenseReluDense.wi_0", f"{last}.DenseReluDense.wi_1"))
    else:
        tensors.linear(f"{ours}.mlp.linear_fc1", f"{last}.DenseReluDense.wi", model.ffn_size)
    tensors.linear(f"{ours}.mlp.linear_fc2", f"{last}.DenseReluDense.wo", h)


T5 = Architecture(
    "T5ForConditionalGeneration", "t5",
    takes={
        "family": ("encoder_decoder",), "norm_position": ("pre",), "normalization": ("RMSNorm",),
        "position_embedding_type": ("relative",), "add_bias_linear": (False,), "qk_layernorm": (False,), "embedding_layernorm": (False,),
    },
    settings=_settings, tensors=_tensors, section=_section, biases=lambda model: False, free_head_size=True,
)
