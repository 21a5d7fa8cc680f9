"""Brings a Hugging Face folder in as a checkpoint to start from: plain (`vanilla`) or unfolded for a scheme. Runs no code of it.

Reads config.json, safetensors and a SentencePiece model, nothing else.
"""

import json
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from megadsl.checkpoint.fold import Folding, folding, unfold
from megadsl.checkpoint.huggingface.architecture import Architecture
from megadsl.checkpoint.huggingface.export import ARCHITECTURES, staged_folder
from megadsl.checkpoint.huggingface.mapping import TensorMap
from megadsl.checkpoint.manifest import CheckpointInfo, library_versions
from megadsl.checkpoint.store import complete_folder, write_small_files
from megadsl.checkpoint.weights import write_tensors
from megadsl.config import Config
from megadsl.config.load import parse_config
from megadsl.data.dataset import TOKENIZER
from megadsl.data.tokenizer import Tokenizer
from megadsl.errors import UserError
from megadsl.schemes.plan import SignalPlan
from megadsl.schemes.registry import build_plan

_TOKENIZER_FILES = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")


def import_huggingface(folder: Path, output: Path, scheme: str = "vanilla", tokenizer_file: Path | None = None) -> Path:
    """Write checkpoint `output` from `folder`; checkpoint.init_from takes it.

    Raises:
        UserError: not a folder of a known architecture, or one that asks for what we have not.
    """
    values = _settings(folder)
    architecture = next((known for known in ARCHITECTURES.values() if known.model_type == values.get("model_type")), None)
    if architecture is None:
        known = ", ".join(known.model_type for known in ARCHITECTURES.values())
        raise UserError(f"{folder} is of model_type {values.get('model_type')}; those that can be imported are {known}.")
    tokenizer_file = tokenizer_file or _tokenizer_file(folder)
    tokenizer = Tokenizer.load(tokenizer_file)
    try:
        vocab_size = values["vocab_size"]
        if tokenizer.vocab_size > vocab_size:
            raise UserError(f"{tokenizer_file} has {tokenizer.vocab_size} pieces, but the model knows {vocab_size}; give its own tokenizer.")
        config = _config(architecture, values, scheme, tokenizer_file, tokenizer.vocab_size)
        config, plan, folded = _under_scheme(architecture, config, vocab_size)
    except KeyError as error:
        raise UserError(f"{folder / 'config.json'} has no key {error}.") from error
    mapping = TensorMap(config.model, vocab_size, vocab_size, architecture.biases(config.model))
    architecture.tensors(mapping, values)
    with ExitStack() as stack, staged_folder(output) as staging:
        weights = dict(mapping.read(_tensors(folder, stack)))
        write_initial(staging, config, plan, tokenizer, vocab_size, unfold(weights, folded))
    return output


def write_initial(staging: Path, config: Config, plan: SignalPlan, tokenizer: Tokenizer, vocab_size: int,
                  weights: Iterable[tuple[str, torch.Tensor]]) -> None:
    """A complete checkpoint of weights alone, at iteration 0, in the folder `staging`."""
    records, error = write_tensors(staging, "imported", (("weights", *item) for item in weights))
    if error is not None:
        raise error
    records |= write_small_files(staging, config, plan, {TOKENIZER: tokenizer.content})
    complete_folder(staging, CheckpointInfo(
        0, 0, 0, None, 1, 1, 1, config.parallel.zero_stage, vocab_size, tokenizer.sha256, library_versions()), records)


def require_open_gates(plan: SignalPlan, folded: Folding) -> None:
    """Refuse a scheme under which plain weights cannot be unfolded."""
    if any(gate.start == 0.0 for gate in folded.gates.values()):
        raise UserError(f"scheme {plan.scheme} starts its branches at 0, which no trained weights can be divided by; choose another scheme.")


def _settings(folder: Path) -> dict:
    try:
        values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / 'config.json'} cannot be read ({error}); give the folder of a Hugging Face model.") from error
    return values


def _tokenizer_file(folder: Path) -> Path:
    for name in _TOKENIZER_FILES:
        if (folder / name).is_file():
            return folder / name
    raise UserError(f"{folder} has no SentencePiece model ({', '.join(_TOKENIZER_FILES)}); give one with --tokenizer.")


def _config(architecture: Architecture, values: dict, scheme: str, tokenizer_file: Path, pieces: int) -> Config:
    # Training pads the tokenizer's size to a multiple of this, which must give the model's vocabulary again.
    size = values["vocab_size"]
    multiple = next((m for m in (128, 64, 32, 16, 8, 4, 2, 1) if -(-pieces // m) * m == size), size)
    model = architecture.section(values)
    task = {"corruption": "infilling"} if architecture.fixed_epsilon and model["family"] == "encoder_decoder" else {}
    return parse_config({
        "model": model, "scheme": scheme, "task": task,
        "tokenizer": {"model": str(tokenizer_file), "make_vocab_size_divisible_by": multiple},
    })


def _under_scheme(architecture: Architecture, config: Config, vocab_size: int):
    plan = build_plan(config.model, config.scheme, None, vocab_size)
    folded = folding(plan, config.model)
    require_open_gates(plan, folded)
    if architecture.fixed_epsilon is None:
        epsilon = config.model.layernorm_epsilon / folded.epsilon_factor
        config = config.model_copy(update={"model": config.model.model_copy(update={"layernorm_epsilon": epsilon})})
    return config, plan, folded


def _tensors(folder: Path, stack: ExitStack) -> Mapping[str, torch.Tensor]:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError(f"{folder} has no safetensors; others such as pytorch_model.bin can hold code and are not read. "
                        "Save it again with save_pretrained, which writes safetensors.")
    places = {}
    try:
        for file in files:
            opened = stack.enter_context(safe_open(file, framework="pt"))
            places |= dict.fromkeys(opened.keys(), opened)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file} cannot be read ({error}).") from error
    return _Lazy(places)


class _Lazy(Mapping):
    """Tensors that are read when they are asked for."""

    def __init__(self, places: dict):
        self._places = places

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._places[name].get_tensor(name)

    def __iter__(self):
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)
