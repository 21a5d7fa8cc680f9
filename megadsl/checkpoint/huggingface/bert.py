"""BertForMaskedLM (Post-LN, arXiv 1810.04805) and MegatronBertForMaskedLM (Pre-LN, arXiv 1909.08053).

Of a model with a sentence-order head the head is left out: the two classes have none. Finetuned heads are bert_heads.py's.
"""

from megadsl.checkpoint.huggingface.architecture import ACTIVATIONS, Architecture, only, our_activation
from megadsl.checkpoint.huggingface.mapping import TensorMap
from megadsl.config.model import ModelConfig


def _settings(model: ModelConfig) -> dict:
    return {
        "hidden_size": model.hidden_size, "num_hidden_layers": model.num_layers, "num_attention_heads": model.num_attention_heads,
        "intermediate_size": model.ffn_size, "hidden_act": ACTIVATIONS[model.activation], "max_position_embeddings": model.seq_length,
        "type_vocab_size": max(1, model.num_tokentypes), "layer_norm_eps": model.layernorm_epsilon,
        "hidden_dropout_prob": model.hidden_dropout, "attention_probs_dropout_prob": model.attention_dropout,
        "tie_word_embeddings": not model.untie_embeddings_and_output_weights,
    }


def _section(values: dict) -> dict:
    only(values, is_decoder=False, add_cross_attention=False, position_embedding_type="absolute")
    post = values["model_type"] == "bert"
    return {
        "family": "encoder", "norm_position": "post" if post else "pre", "embedding_layernorm": post,
        "num_layers": values["num_hidden_layers"], "hidden_size": values["hidden_size"],
        "num_attention_heads": values["num_attention_heads"], "ffn_hidden_size": values["intermediate_size"],
        "seq_length": values["max_position_embeddings"], "activation": our_activation(values.get("hidden_act", "gelu")),
        "layernorm_epsilon": values.get("layer_norm_eps", 1e-12), "num_tokentypes": values.get("type_vocab_size", 2),
        "untie_embeddings_and_output_weights": not values.get("tie_word_embeddings", True),
        "hidden_dropout": values.get("hidden_dropout_prob", 0.1), "attention_dropout": values.get("attention_probs_dropout_prob", 0.1),
    }


def trunk_tensors(tensors: TensorMap) -> None:
    """Embedding and layers, whatever the head."""
    model, h, post = tensors.model, tensors.model.hidden_size, tensors.model.norm_position == "post"
    embeddings = "bert.embeddings"
    tensors.vocabulary("embedding.word.table.weight", f"{embeddings}.word_embeddings.weight")
    tensors.positions("embedding.position", f"{embeddings}.position_embeddings.weight", model.seq_length, model.seq_length)
    if model.num_tokentypes:
        tensors.tensor("embedding.tokentype", f"{embeddings}.token_type_embeddings.weight")
    else:
        tensors.constant(f"{embeddings}.token_type_embeddings.weight", 1, h)
    if post:
        tensors.norm("embedding.norm", f"{embeddings}.LayerNorm")
    for index in range(model.num_layers):
        ours, theirs = f"encoder.{index}", f"bert.encoder.layer.{index}"
        attention = f"{theirs}.attention"
        tensors.query_key_value(
            f"{ours}.self_attention.linear_qkv", tuple(f"{attention}.self.{part}" for part in ("query", "key", "value")))
        tensors.linear(f"{ours}.self_attention.linear_proj", f"{attention}.output.dense", h)
        tensors.linear(f"{ours}.mlp.linear_fc1", f"{theirs}.intermediate.dense", model.ffn_size)
        tensors.linear(f"{ours}.mlp.linear_fc2", f"{theirs}.output.dense", h)
        tensors.norm(*((f"{ours}.self_attn_bda.norm", f"{attention}.output.LayerNorm") if post else
                       (f"{ours}.input_layernorm", f"{attention}.ln")))
        tensors.norm(*((f"{ours}.mlp_bda.norm", f"{theirs}.output.LayerNorm") if post else
                       (f"{ours}.pre_mlp_layernorm", f"{theirs}.ln")))
    if not post:
        tensors.norm("final_norm", "bert.encoder.ln")


def _tensors(tensors: TensorMap, values: dict) -> None:
    trunk_tensors(tensors)
    model, head = tensors.model, "cls.predictions"
    tensors.tensor("lm_head.dense.weight", f"{head}.transform.dense.weight")
    tensors.tensor("lm_head.dense.bias", f"{head}.transform.dense.bias")
    tensors.norm("lm_head.norm", f"{head}.transform.LayerNorm")
    if model.untie_embeddings_and_output_weights:
        tensors.vocabulary("output_head.linear.weight", f"{head}.decoder.weight")
        tensors.vocabulary("output_bias.bias", f"{head}.bias", f"{head}.decoder.bias")
    else:
        tensors.vocabulary("output_bias.bias", f"{head}.bias")


def _architecture(name: str, model_type: str, norm_position: str) -> Architecture:
    return Architecture(
        name, model_type,
        takes={
            "family": ("encoder",), "norm_position": (norm_position,), "embedding_layernorm": (norm_position == "post",),
            "normalization": ("LayerNorm",), "position_embedding_type": ("learned_absolute", "sinusoidal", "none"),
            "qk_layernorm": (False,), "activation": ("relu", "gelu", "tanh_gelu", "silu", "squared_relu"),
        },
        settings=_settings, tensors=_tensors, section=_section,
    )


BERT = _architecture("BertForMaskedLM", "bert", "post")
MEGATRON_BERT = _architecture("MegatronBertForMaskedLM", "megatron-bert", "pre")
