"""ViTForImageClassification (arXiv 2010.11929): Pre-LN, a class token, learned or fixed positions; scalars folded into the weights.

The patch embedding is a convolution there whose kernel is its stride: the same numbers as our linear map, [h, c p p] -> [h, c, p, p].
Shape letters: b batch, c channels, p patch, h hidden, k classes.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from megadsl.checkpoint.fold import fold, folding
from megadsl.checkpoint.huggingface.architecture import ACTIVATIONS, Architecture
from megadsl.checkpoint.huggingface.export import staged_folder
from megadsl.checkpoint.huggingface.mapping import Rule, TensorMap
from megadsl.checkpoint.huggingface.verify import ANY_KEYS, load_class, offline_transformers, relative_error, require_close
from megadsl.config.model import ModelConfig
from megadsl.schemes.plan import SignalPlan

NAME = "ViTForImageClassification"


@dataclass(frozen=True)
class Pictures:
    """What the folder must say of the images: sizes, classes, and how pixels from 0 to 1 are normalised, by channel."""

    size: tuple[int, int]
    patch: int
    channels: int
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    deviation: tuple[float, ...]


def _settings(model: ModelConfig) -> dict:
    return {
        "hidden_size": model.hidden_size, "num_hidden_layers": model.num_layers, "num_attention_heads": model.num_attention_heads,
        "intermediate_size": model.ffn_size, "hidden_act": ACTIVATIONS[model.activation], "layer_norm_eps": model.layernorm_epsilon,
        "hidden_dropout_prob": model.hidden_dropout, "attention_probs_dropout_prob": model.attention_dropout, "qkv_bias": True,
    }


def _tensors(tensors: TensorMap, values: dict) -> None:
    model, h, patch = tensors.model, tensors.model.hidden_size, values["patch_size"]
    tensors.rules += [
        Rule("embedding.patches.class_token", ("vit.embeddings.cls_token",), lambda t: [t[None]]),
        Rule("embedding.position", ("vit.embeddings.position_embeddings",), lambda t: [t[None]]),
        Rule("embedding.patches.projection.weight", ("vit.embeddings.patch_embeddings.projection.weight",),
             lambda t: [t.view(h, values["num_channels"], patch, patch)]),
    ]
    tensors.tensor("embedding.patches.projection.bias", "vit.embeddings.patch_embeddings.projection.bias")
    for index in range(model.num_layers):
        ours, theirs = f"encoder.{index}", f"vit.encoder.layer.{index}"
        tensors.norm(f"{ours}.input_layernorm", f"{theirs}.layernorm_before")
        tensors.query_key_value(f"{ours}.self_attention.linear_qkv",
                                tuple(f"{theirs}.attention.attention.{part}" for part in ("query", "key", "value")))
        tensors.linear(f"{ours}.self_attention.linear_proj", f"{theirs}.attention.output.dense", h)
        tensors.norm(f"{ours}.pre_mlp_layernorm", f"{theirs}.layernorm_after")
        tensors.linear(f"{ours}.mlp.linear_fc1", f"{theirs}.intermediate.dense", model.ffn_size)
        tensors.linear(f"{ours}.mlp.linear_fc2", f"{theirs}.output.dense", h)
    tensors.norm("final_norm", "vit.layernorm")
    tensors.tensor("classifier.linear.weight", "classifier.weight")
    tensors.tensor("classifier.linear.bias", "classifier.bias")


VIT = Architecture(
    NAME, "vit",
    takes={
        "family": ("encoder",), "norm_position": ("pre",), "embedding_layernorm": (False,), "normalization": ("LayerNorm",),
        "position_embedding_type": ("learned_absolute", "sinusoidal"), "qk_layernorm": (False,), "num_tokentypes": (0,),
        "activation": ("relu", "gelu", "tanh_gelu", "silu", "squared_relu"),
    },
    settings=_settings, tensors=_tensors, section=dict,
)


def export_vit(weights: dict[str, torch.Tensor], plan: SignalPlan, model: ModelConfig, pictures: Pictures, sample: torch.Tensor,
               logits: torch.Tensor, folder: Path) -> float:
    """Write `folder` and reload it; the largest relative difference of its logits to ours.

    Args:
        weights: canonical name -> tensor; fixed positions among them as "embedding.position".
        sample: pixel_values [b, c, H, W].
        logits: ours of them, [b, k].

    Raises:
        UserError: a part of the model has no place there, or the logits differ; `folder` is then not there.
    """
    VIT.require(model)
    folded = folding(plan, model)
    epsilon = model.layernorm_epsilon * folded.epsilon_factor
    labels = dict(enumerate(pictures.classes))
    settings = {
        "architectures": [NAME], "model_type": "vit", "dtype": "float32", **_settings(model.model_copy(update={"layernorm_epsilon": epsilon})),
        "image_size": list(pictures.size), "patch_size": pictures.patch, "num_channels": pictures.channels,
        "id2label": labels, "label2id": {name: index for index, name in labels.items()},
    }
    mapping = TensorMap(model, 0, 0, their_biases=True)
    _tensors(mapping, settings)
    tensors = {name: tensor.clone() for name, tensor in mapping.export(dict(fold(weights, folded)))}
    processor = {
        "image_processor_type": "ViTImageProcessor", "do_resize": True, "size": {"height": pictures.size[0], "width": pictures.size[1]},
        "do_rescale": True, "rescale_factor": 1.0 / 255.0, "do_normalize": True, "image_mean": list(pictures.mean),
        "image_std": list(pictures.deviation),
    }
    with staged_folder(folder) as staging:
        save_file(tensors, staging / "model.safetensors", metadata={"format": "pt"})
        (staging / "config.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")
        (staging / "preprocessor_config.json").write_text(json.dumps(processor, indent=2), encoding="utf-8")
        error = relative_error(_their_logits(staging, sample), logits)
        require_close(NAME, error)
    return error


@torch.inference_mode()
def _their_logits(folder: Path, sample: torch.Tensor) -> torch.Tensor:
    model = load_class(offline_transformers().AutoModelForImageClassification, folder, ANY_KEYS)
    return model(pixel_values=sample).logits
