"""Writes a model as a plain Hugging Face folder: scalars folded into the weights, tokenizer and card beside them, verified.

The folder appears under its name only when a reload from disk has given the same logits. Its vocabulary is the tokenizer's: the rows
that pad ours are cut off, because generation could sample them.
"""

import json
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from megadsl.checkpoint.fold import Folding, fold, folding
from megadsl.checkpoint.huggingface.architecture import Architecture, special_ids
from megadsl.checkpoint.huggingface.bart import BART, MBART
from megadsl.checkpoint.huggingface.bert import BERT, MEGATRON_BERT
from megadsl.checkpoint.huggingface.card import model_card
from megadsl.checkpoint.huggingface.gpt2 import GPT2
from megadsl.checkpoint.huggingface.llama import LLAMA
from megadsl.checkpoint.huggingface.mapping import TensorMap
from megadsl.checkpoint.huggingface.t5 import T5
from megadsl.checkpoint.huggingface.tokenizer import write_tokenizer
from megadsl.checkpoint.huggingface.verify import Comparison, compare_with_folder
from megadsl.checkpoint.export_source import ExportSource
from megadsl.config.model import ModelConfig
from megadsl.errors import UserError
from megadsl.model.embedding import sinusoid
from megadsl.model.precision import DTYPES
from megadsl.schemes.plan import SignalPlan

ARCHITECTURES = {architecture.name: architecture for architecture in (GPT2, LLAMA, BERT, MEGATRON_BERT, T5, BART, MBART)}
SHARD_BYTES = 4 << 30


@dataclass(frozen=True)
class Export:
    """What was written."""

    folder: Path
    architecture: str
    comparison: Comparison
    notes: list[str]


def export_huggingface(source: ExportSource, folder: Path, architecture: str = "auto", dtype: str = "fp32",
                       shard_bytes: int = SHARD_BYTES) -> Export:
    """Write `folder`, which must not exist or be empty.

    Raises:
        UserError: the architecture has no place for a part of the model, or the reloaded model gives other logits.
    """
    chosen = choose_architecture(source.config.model, architecture)
    chosen.require(source.config.model)
    folded = folding(source.plan, source.config.model)
    tensors, settings, notes = their_model(source, chosen, folded)
    with staged_folder(folder) as staging:
        size = write_shards(staging, ((name, tensor.to(DTYPES[dtype])) for name, tensor in tensors), shard_bytes)
        settings = {"architectures": [chosen.name], "model_type": chosen.model_type, "dtype": str(DTYPES[dtype])[6:], **settings}
        (staging / "config.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")
        reason = write_tokenizer(source.tokenizer, source.tokenizer_file, staging)
        if reason:
            notes.append(f"No tokenizer.json: {reason}. Use tokenizer.model with the sentencepiece package.")
        exact = None if dtype == "fp32" else lambda: their_model(source, chosen, folded)[0]
        comparison = compare_with_folder(source, chosen.name, staging, exact, has_tokenizer=reason is None)
        card = model_card(source, chosen.name, folded, comparison, dtype, size, notes)
        (staging / "README.md").write_text(card, encoding="utf-8")
    return Export(folder, chosen.name, comparison, notes)


def choose_architecture(model: ModelConfig, name: str = "auto") -> Architecture:
    """The architecture of that name, or the one for the model's family, positions and norm position."""
    if name != "auto":
        if name not in ARCHITECTURES:
            raise UserError(f"There is no architecture {name} to export to; choose one of {', '.join(ARCHITECTURES)} or auto.")
        return ARCHITECTURES[name]
    post, positions = model.norm_position == "post", model.position_embedding_type
    return {
        ("decoder",): LLAMA if positions == "rope" else GPT2,
        ("encoder",): BERT if post else MEGATRON_BERT,
        ("encoder", "decoder"): T5 if positions == "relative" else BART if post else MBART,
    }[tuple(model.stack_layers)]


def their_model(source: ExportSource, architecture: Architecture, folded: Folding) -> tuple[Iterable, dict, list[str]]:
    """(their tensors by name, one after the other; keys of config.json; what a reader should know)."""
    model = source.config.model
    weights = dict(fold(_with_positions(source.weights, model, source.plan), folded))
    vocab_size = source.tokenizer.vocab_size
    epsilon = architecture.fixed_epsilon or model.layernorm_epsilon * folded.epsilon_factor
    settings = architecture.settings(model.model_copy(update={"layernorm_epsilon": epsilon}))
    settings |= {"vocab_size": vocab_size, **special_ids(source.tokenizer)}
    if len(model.stack_layers) > 1 and "bos_token_id" in settings:
        settings["decoder_start_token_id"] = settings["bos_token_id"]
    mapping = TensorMap(model, vocab_size, source.padded_vocab_size, architecture.biases(model))
    architecture.tensors(mapping, settings)
    notes = [f"The tensor {name} has no place in {architecture.name} and is left out."
             for name in weights if name not in {rule.ours for rule in mapping.rules}]
    if model.position_embedding_type == "sinusoidal":
        notes.append("The fixed sinusoidal positions are written as a table, which training would change.")
    return mapping.export(weights), settings, notes


def _with_positions(weights: dict, model: ModelConfig, plan: SignalPlan) -> dict:
    """With a table for positions that need none here (sinusoidal: computed, none: zeros) and are looked up over there."""
    if model.position_embedding_type not in ("sinusoidal", "none"):
        return weights
    lengths = {f"{stack}.embedding" if len(model.stack_lengths) > 1 else "embedding": rows for stack, rows in model.stack_lengths.items()}
    std = plan.embedding.weight_std.get("position_embedding", 0.0)
    return weights | {f"{name}.position": sinusoid(rows, model.hidden_size) * std for name, rows in lengths.items()}


@contextmanager
def staged_folder(folder: Path) -> Iterator[Path]:
    """A folder beside `folder` that takes its name at the end, and is removed where something fails."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists already; choose another folder or remove it.")
    staging = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(staging, ignore_errors=True)
    try:
        staging.mkdir(parents=True)
        yield staging
        if folder.exists():
            folder.rmdir()
        staging.rename(folder)
    except OSError as error:
        raise UserError(f"{folder} cannot be written ({error.strerror or error}).") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def write_shards(folder: Path, tensors: Iterable[tuple[str, torch.Tensor]], shard_bytes: int) -> int:
    """model.safetensors, or several of at most `shard_bytes` with an index; the bytes written. Holds one shard in memory."""
    shards, pending, size = [], {}, 0

    def flush() -> None:
        save_file(pending, folder / f"shard-{len(shards)}", metadata={"format": "pt"})
        shards.append((list(pending), size))
        pending.clear()

    for name, tensor in tensors:
        bytes_here = tensor.numel() * tensor.element_size()
        if pending and size + bytes_here > shard_bytes:
            flush()
            size = 0
        # Rows cut from a larger table, or one tensor under two names, would be written whole.
        pending[name], size = tensor.clone(), size + bytes_here
    flush()
    total = sum(bytes_here for _, bytes_here in shards)
    if len(shards) == 1:
        (folder / "shard-0").rename(folder / "model.safetensors")
        return total
    places = {}
    for number, (names, _) in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"shard-{number}").rename(folder / file)
        places |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")
    return total
