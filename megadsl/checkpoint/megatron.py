"""A decoder to and from a Megatron-core checkpoint (dist_checkpointing, torch_dist), for Megatron users' own tools.

The scheme's scalars are folded into plain weights (fold.py), so a stock GPTModel takes them; the names of its layers are ours. What is
written is loaded again into a fresh stock GPTModel and its logits are compared with ours. Decoders in Pre-LN only: stock
Megatron-core layers are Pre-LN, and its BERT and T5 models add parts that ours have not. Megatron's format keeps its index in
pickles, which can run code when they are read, so a foreign folder must be trusted in words.
"""

import copy
from pathlib import Path

import torch
import megadsl.parallel.device  # noqa: F401  isort: skip  (before Megatron-core)
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from torch.distributed.checkpoint.api import CheckpointException

from megadsl.checkpoint.fold import fold, folding, unfold
from megadsl.checkpoint.huggingface.export import staged_folder
from megadsl.checkpoint.huggingface.importing import require_open_gates, write_initial
from megadsl.checkpoint.huggingface.verify import relative_error, require_close
from megadsl.checkpoint.export_source import ExportSource
from megadsl.config import Config
from megadsl.config.model import ModelConfig
from megadsl.data.tokenizer import Tokenizer
from megadsl.errors import UserError
from megadsl.model.layer import transformer_config
from megadsl.parallel.rng import seed_micro_batch
from megadsl.schemes.registry import build_plan

_POSITIONS = ("learned_absolute", "rope", "none")
_OUTER = {
    "embedding.word.table.weight": "embedding.word_embeddings.weight", "embedding.position": "embedding.position_embeddings.weight",
    "output_head.linear.weight": "output_layer.weight",
}


def export_megatron(source: ExportSource, folder: Path) -> float:
    """Write `folder`; the largest relative difference between the logits of a stock GPTModel that loaded it and ours.

    Raises:
        UserError: stock Megatron-core has no place for a part of the model, or its logits are others.
    """
    shape = source.config.model
    require_stock(shape)
    if folder.exists():
        raise UserError(f"{folder} exists already; choose another folder or remove it.")
    folded = folding(source.plan, shape)
    model = stock_model(shape, source.padded_vocab_size, folded.epsilon_factor)
    ours = dict(fold(source.weights, folded))
    parameters = dict(model.named_parameters())
    missing = parameters.keys() ^ {megatron_name(name) for name in ours}
    if missing:
        raise UserError(f"Megatron-core's GPTModel and this model do not have the same parameters: {', '.join(sorted(missing)[:3])}.")
    with torch.no_grad():
        for name, tensor in ours.items():
            parameters[megatron_name(name)].copy_(tensor)
    with staged_folder(folder) as staging:
        dist_checkpointing.save({"model": model.sharded_state_dict()}, str(staging))
        loaded = stock_model(shape, source.padded_vocab_size, folded.epsilon_factor)
        _load(loaded, staging)
        tokens = source.sample["tokens"]
        theirs, expected = stock_logits(loaded, tokens)[..., :source.tokenizer.vocab_size], source.logits({"tokens": tokens})
        error = relative_error(theirs, expected)
        require_close("GPTModel", error)
    return error


def import_megatron(folder: Path, output: Path, config: Config, trust: bool) -> Path:
    """Write checkpoint `output`, for checkpoint.init_from, from the GPTModel in `folder`, whose shape and tokenizer `config` gives.

    Raises:
        UserError: the folder is not trusted, is no such checkpoint, or holds another model.
    """
    if not trust:
        raise UserError(f"{folder} keeps its index in pickles, which can run code when they are read; if you know who wrote it, add --trust.")
    shape, tokenizer = config.model, Tokenizer.load(config.tokenizer.model)
    require_stock(shape)
    vocab_size = config.tokenizer.padded_vocab_size(tokenizer.vocab_size)
    plan = build_plan(shape, config.scheme, None, vocab_size)
    folded = folding(plan, shape)
    require_open_gates(plan, folded)
    model = stock_model(shape, vocab_size, folded.epsilon_factor)
    try:
        _load(model, folder)
    except (CheckpointingException, CheckpointException, OSError, RuntimeError, KeyError) as error:
        reason = str(error).strip().splitlines()[-1]
        raise UserError(f"{folder} does not hold a GPTModel of this shape ({reason}); check the model section.") from error
    weights = {our_name(name): parameter.detach() for name, parameter in model.named_parameters()}
    with staged_folder(output) as staging:
        write_initial(staging, config, plan, tokenizer, vocab_size, unfold(weights, folded))
    return output


def require_stock(model: ModelConfig) -> None:
    """Refuse what a stock GPTModel cannot hold, naming the key."""
    for key, fits in (("family", tuple(model.stack_layers) == ("decoder",)), ("norm_position", model.norm_position == "pre"),
                      ("position_embedding_type", model.position_embedding_type in _POSITIONS),
                      ("embedding_layernorm", not model.embedding_layernorm),
                      ("attention_logit_softcap", not model.attention_logit_softcap)):
        if not fits:
            # No format that we write knows capped scores.
            way_out = "" if key == "attention_logit_softcap" else "; export with --format hf"
            raise UserError(f"model.{key}={getattr(model, key)} has no place in Megatron-core's GPTModel{way_out}.")


def stock_model(model: ModelConfig, padded_vocab_size: int, epsilon_factor: float) -> GPTModel:
    """Megatron-core's own GPTModel of that shape, on local (not Transformer Engine) layers, in evaluation mode."""
    config = copy.copy(transformer_config(model))
    config.layernorm_epsilon = model.layernorm_epsilon * epsilon_factor
    spec = get_gpt_layer_local_spec(qk_layernorm=model.qk_layernorm, normalization=model.normalization)
    return GPTModel(
        config, spec, padded_vocab_size, model.seq_length, parallel_output=False,
        share_embeddings_and_output_weights=not model.untie_embeddings_and_output_weights,
        position_embedding_type=model.position_embedding_type, rotary_base=model.rotary_base,
    ).eval()


@torch.inference_mode()
def stock_logits(model: GPTModel, tokens: torch.Tensor) -> torch.Tensor:
    """tokens [b, s] -> logits [b, s, v]."""
    seed_micro_batch(0, 0, 0)  # its attention forks the generators even where nothing is dropped
    length = tokens.size(1)
    positions = torch.arange(length).expand_as(tokens)
    mask = torch.ones(1, 1, length, length, dtype=torch.bool).triu(1)
    return model(tokens, positions, mask)


def megatron_name(name: str) -> str:
    """Our canonical name -> GPTModel's."""
    if name in _OUTER:
        return _OUTER[name]
    if name.startswith("final_norm."):
        return name.replace("final_norm", "decoder.final_layernorm")
    return name.replace("decoder.", "decoder.layers.", 1)


def our_name(name: str) -> str:
    """Inverse of `megatron_name`."""
    for ours, theirs in _OUTER.items():
        if name == theirs:
            return ours
    return name.replace("decoder.final_layernorm", "final_norm").replace("decoder.layers.", "decoder.", 1)


def _load(model: GPTModel, folder: Path) -> None:
    state = dist_checkpointing.load({"model": model.sharded_state_dict()}, str(folder))
    model.load_state_dict(state["model"])
