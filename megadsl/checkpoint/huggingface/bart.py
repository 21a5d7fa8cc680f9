"""BartForConditionalGeneration (Post-LN, arXiv 1910.13461) and MBartForConditionalGeneration (Pre-LN, arXiv 2001.08210).

Their tables of positions begin with two rows that nothing reads; encoder and decoder have tables of the same length.
"""

import math

from megadsl.checkpoint.huggingface.architecture import ACTIVATIONS, Architecture, only, our_activation
from megadsl.checkpoint.huggingface.mapping import TensorMap
from megadsl.config.model import ModelConfig

_UNUSED_POSITIONS = 2


def _settings(model: ModelConfig) -> dict:
    by_stack = {}
    for stack, layers in (("encoder", model.num_layers), ("decoder", model.decoder_layers)):
        by_stack |= {f"{stack}_layers": layers, f"{stack}_ffn_dim": model.ffn_size,
                     f"{stack}_attention_heads": model.num_attention_heads}
    return {
        "d_model": model.hidden_size, **by_stack, "max_position_embeddings": max(model.seq_length, model.target_length),
        "activation_function": ACTIVATIONS[model.activation], "dropout": model.hidden_dropout,
        "attention_dropout": model.attention_dropout, "scale_embedding": False, "is_encoder_decoder": True,
        "tie_word_embeddings": not model.untie_embeddings_and_output_weights, "forced_eos_token_id": None,
    }


def _section(values: dict) -> dict:
    only(values, decoder_ffn_dim=values["encoder_ffn_dim"], decoder_attention_heads=values["encoder_attention_heads"],
         activation_dropout=0.0, tie_word_embeddings=True)
    return {
        "family": "encoder_decoder", "norm_position": "post" if values["model_type"] == "bart" else "pre", "embedding_layernorm": True,
        "num_layers": values["encoder_layers"], "num_decoder_layers": values["decoder_layers"], "hidden_size": values["d_model"],
        "num_attention_heads": values["encoder_attention_heads"], "ffn_hidden_size": values["encoder_ffn_dim"],
        "seq_length": values["max_position_embeddings"], "activation": our_activation(values.get("activation_function", "gelu")),
        "layernorm_epsilon": 1e-5, "hidden_dropout": values.get("dropout", 0.1),
        "attention_dropout": values.get("attention_dropout", 0.0),
    }


def _tensors(tensors: TensorMap, values: dict) -> None:
    model, post = tensors.model, tensors.model.norm_position == "post"
    scale = math.sqrt(model.hidden_size) if values.get("scale_embedding") else 1.0  # theirs multiply what they look up
    tensors.vocabulary("embedding.word.table.weight", "model.shared.weight", scale=1.0 / scale)
    lengths = {"encoder": (model.num_layers, model.seq_length), "decoder": (model.decoder_layers, model.target_length)}
    for stack, (layers, length) in lengths.items():
        theirs = f"model.{stack}"
        tensors.positions(f"{stack}.embedding.position", f"{theirs}.embed_positions.weight", length,
                          max(model.seq_length, model.target_length), _UNUSED_POSITIONS)
        tensors.norm(f"{stack}.embedding.norm", f"{theirs}.layernorm_embedding")
        for index in range(layers):
            last = post and stack == "decoder" and index == layers - 1
            _layer(tensors, f"{stack}.{index}", f"{theirs}.layers.{index}", stack == "decoder", scale if last else 1.0)
    if not post:
        tensors.norm("encoder.final_norm", "model.encoder.layer_norm")
        tensors.norm("final_norm", "model.decoder.layer_norm", scale)
    tensors.constant("final_logits_bias", 1, tensors.vocab_size)


def _layer(tensors: TensorMap, ours: str, theirs: str, cross: bool, last_scale: float) -> None:
    model, h, post = tensors.model, tensors.model.hidden_size, tensors.model.norm_position == "post"
    tensors.norm(f"{ours}.self_attn_bda.norm" if post else f"{ours}.input_layernorm", f"{theirs}.self_attn_layer_norm")
    tensors.query_key_value(f"{ours}.self_attention.linear_qkv", tuple(f"{theirs}.self_attn.{part}_proj" for part in "qkv"))
    tensors.linear(f"{ours}.self_attention.linear_proj", f"{theirs}.self_attn.out_proj", h)
    if cross:
        attention = f"{theirs}.encoder_attn"
        tensors.norm(f"{ours}.cross_attn_bda.norm" if post else f"{ours}.pre_cross_attn_layernorm", f"{theirs}.encoder_attn_layer_norm")
        tensors.linear(f"{ours}.cross_attention.linear_q", f"{attention}.q_proj", h)
        tensors.key_value(f"{ours}.cross_attention.linear_kv", (f"{attention}.k_proj", f"{attention}.v_proj"))
        tensors.linear(f"{ours}.cross_attention.linear_proj", f"{attention}.out_proj", h)
    tensors.norm(f"{ours}.mlp_bda.norm" if post else f"{ours}.pre_mlp_layernorm", f"{theirs}.final_layer_norm", last_scale)
    tensors.linear(f"{ours}.mlp.linear_fc1", f"{theirs}.fc1", model.ffn_size)
    tensors.linear(f"{ours}.mlp.linear_fc2", f"{theirs}.fc2", h)


def _architecture(name: str, model_type: str, norm_position: str) -> Architecture:
    return Architecture(
        name, model_type,
        takes={
            "family": ("encoder_decoder",), "norm_position": (norm_position,), "embedding_layernorm": (True,),
            "normalization": ("LayerNorm",), "position_embedding_type": ("learned_absolute", "sinusoidal", "none"),
            "qk_layernorm": (False,), "activation": ("relu", "gelu", "tanh_gelu", "silu", "squared_relu"),
            "untie_embeddings_and_output_weights": (False,),
        },
        settings=_settings, tensors=_tensors, section=_section, fixed_epsilon=1e-5,
    )


BART = _architecture("BartForConditionalGeneration", "bart", "post")
MBART = _architecture("MBartForConditionalGeneration", "mbart", "pre")
