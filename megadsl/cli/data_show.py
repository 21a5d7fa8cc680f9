"""Samples of a run's objective as a person reads them: tokens as pieces, all else run by run (value ×how often).

Only labels that count (loss_mask 1) are printed; an ellipsis stands for the rest.
"""

from itertools import groupby

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from megadsl.config import Config
from megadsl.data.dataset import check_datasets
from megadsl.data.lengths import filled_target
from megadsl.data.objective import open_datasets
from megadsl.data.tokenizer import Tokenizer

_TOKENS = ("tokens", "source_tokens", "target_tokens", "labels")
_LEFT_OUT = "\u2026"
_SIGNS = str.maketrans({"\n": "\u21b5", "\t": "\u21e5"})


def show_samples(config: Config, split: str, count: int) -> None:
    """Print the first `count` samples of a split.

    Raises:
        UserError: the config does not fit its datasets.
    """
    tokenizer = check_datasets(config)
    samples = getattr(open_datasets(config, tokenizer.sha256, train_samples=count), split)
    console = Console(width=None if Console().is_terminal else 120, highlight=False)
    console.print(f"{_objective(config)} | {split}: {samples.samples_per_epoch:,} samples an epoch", markup=False)
    for index in range(min(count, len(samples))):
        sample = {key: tensor.numpy() for key, tensor in samples[index].items()}
        predicted = sample.pop("loss_mask") == 1
        console.print(f"\nsample {index}: {predicted.sum()} of {predicted.size} labels count")
        table = Table.grid(padding=(0, 2))
        for key, value in sample.items():
            table.add_row(key, _pieces(key, value, predicted, config, tokenizer) if key in _TOKENS else _runs(value))
        console.print(table)
    if hint := _padding_hint(config):
        console.print(f"\n{hint}", markup=False)


def _objective(config: Config) -> str:
    data, family = config.data, config.model.family
    if family == "decoder":
        return "next token" + ", after a prefix" * data.prefix_lm
    if family == "encoder":
        words = "whole words" if data.masking_do_full_word else "pieces"
        return f"masked tokens, {data.masking_probability:.0%} as {words}" + ", and the order of two halves" * data.sentence_order
    name = data.denoising.replace("_", " ")
    return f"{name}, {data.noise_density:.0%} in spans of {data.mean_noise_span_length:g} on average"


def _pieces(key: str, ids: np.ndarray, predicted: np.ndarray, config: Config, tokenizer: Tokenizer) -> Text:
    """Pieces with spaces between; an encoder's «pieces» that it must predict are marked."""
    shown = [_visible(piece) for piece in tokenizer.pieces(ids.tolist())]
    if key == "labels":
        shown = [piece if counts else _LEFT_OUT for piece, counts in zip(shown, predicted, strict=True)]
    elif config.model.family == "encoder":
        shown = [f"«{piece}»" if counts else piece for piece, counts in zip(shown, predicted, strict=True)]
    parts = []
    for piece, run in groupby(shown):
        length = len(list(run))
        parts += [piece] if piece == _LEFT_OUT else [f"{piece} ×{length}"] if length > 3 else [piece] * length
    text = Text(" ".join(parts))
    text.highlight_regex("«.*?»", "bold")
    return text


def _visible(piece: str) -> str:
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in piece.translate(_SIGNS))


def _runs(values: np.ndarray) -> str:
    """`1 x40, 2 x88`, or the one number."""
    return ", ".join(f"{value} ×{len(list(run))}" for value, run in groupby(values.tolist())) if values.ndim else str(values)


def _padding_hint(config: Config) -> str | None:
    """What to set where every target is mostly padding, which costs as much as tokens do."""
    if config.model.family != "encoder_decoder":
        return None
    length, filled = config.model.target_length, filled_target(config)
    if length == filled:
        return None
    return f"{(length - filled) / length:.0%} of every target is padding; model.decoder_seq_length={filled} is enough."
