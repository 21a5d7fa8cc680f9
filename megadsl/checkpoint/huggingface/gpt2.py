"""GPT2LMHeadModel: a Pre-LN decoder with LayerNorm and a table of positions (Radford et al. 2019)."""

from megadsl.checkpoint.huggingface.architecture import ACTIVATIONS, Architecture, only, our_activation
from megadsl.checkpoint.huggingface.mapping import TensorMap
from megadsl.config.model import ModelConfig


def _settings(model: ModelConfig) -> dict:
    return {
        "n_positions": model.seq_length, "n_embd": model.hidden_size, "n_layer": model.num_layers,
        "n_head": model.num_attention_heads, "n_inner": model.ffn_size, "activation_function": ACTIVATIONS[model.activation],
        "layer_norm_epsilon": model.layernorm_epsilon, "tie_word_embeddings": not model.untie_embeddings_and_output_weights,
        "embd_pdrop": model.hidden_dropout, "resid_pdrop": model.hidden_dropout, "attn_pdrop": model.attention_dropout,
    }


def _section(values: dict) -> dict:
    only(values, scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False)
    return {
        "family": "decoder", "norm_position": "pre", "num_layers": values["n_layer"], "hidden_size": values["n_embd"],
        "num_attention_heads": values["n_head"], "ffn_hidden_size": values.get("n_inner") or 4 * values["n_embd"],
        "seq_length": values["n_positions"], "activation": our_activation(values.get("activation_function", "gelu_new")),
        "layernorm_epsilon": values.get("layer_norm_epsilon", 1e-5),
        "untie_embeddings_and_output_weights": not values.get("tie_word_embeddings", True),
        "hidden_dropout": values.get("resid_pdrop", 0.1), "attention_dropout": values.get("attn_pdrop", 0.1),
    }


def _tensors(tensors: TensorMap, values: dict) -> None:
    model, h = tensors.model, tensors.model.hidden_size
    tensors.vocabulary("embedding.word.table.weight", "transformer.wte.weight")
    tensors.positions("embedding.position", "transformer.wpe.weight", model.seq_length, model.seq_length)
    for index in range(model.num_layers):
        ours, theirs = f"decoder.{index}", f"transformer.h.{index}"
        tensors.norm(f"{ours}.input_layernorm", f"{theirs}.ln_1")
        tensors.fused_query_key_value(f"{ours}.self_attention.linear_qkv", f"{theirs}.attn.c_attn")
        tensors.linear(f"{ours}.self_attention.linear_proj", f"{theirs}.attn.c_proj", h, transposed=True)
        tensors.norm(f"{ours}.pre_mlp_layernorm", f"{theirs}.ln_2")
        tensors.linear(f"{ours}.mlp.linear_fc1", f"{theirs}.mlp.c_fc", model.ffn_size, transposed=True)
        tensors.linear(f"{ours}.mlp.linear_fc2", f"{theirs}.mlp.c_proj", h, transposed=True)
    tensors.norm("final_norm", "transformer.ln_f")
    if model.untie_embeddings_and_output_weights:
        tensors.vocabulary("output_head.linear.weight", "lm_head.weight")


GPT2 = Architecture(
    "GPT2LMHeadModel", "gpt2",
    takes={
        "family": ("decoder",), "norm_position": ("pre",), "normalization": ("LayerNorm",),
        "position_embedding_type": ("learned_absolute", "sinusoidal", "none"), "qk_layernorm": (False,), "embedding_layernorm": (False,),
        "activation": ("relu", "gelu", "tanh_gelu", "silu", "squared_relu"),
    },
    settings=_settings, tensors=_tensors, section=_section,
)
