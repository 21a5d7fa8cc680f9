"""Samples of a language task as a person reads them: tokens as pieces, all else run by run (value ×how often).

Only labels that count (loss_mask 1) are printed; an ellipsis stands for the rest.
"""

from collections.abc import Iterator
from itertools import groupby

import numpy as np
from rich.table import Table
from rich.text import Text

from megadsl.data.tokenizer import Tokenizer
from megadsl.tasks.language.samples import Samples
from megadsl.tasks.language.task import LanguageTask

_TOKENS = ("tokens", "source_tokens", "target_tokens", "labels")
_LEFT_OUT = "\u2026"
_SIGNS = str.maketrans({"\n": "\u21b5", "\t": "\u21e5"})


def describe_samples(task: LanguageTask, samples: Samples, split: str, count: int) -> Iterator[Text | Table]:
    """What `megadsl data show` prints of the first `count` samples of a split."""
    yield Text(f"{task.describe_objective()} | {split}: {samples.samples_per_epoch:,} samples an epoch")
    for index in range(min(count, len(samples))):
        sample = {key: tensor.numpy() for key, tensor in samples[index].items()}
        predicted = sample.pop("loss_mask") == 1
        yield Text(f"\nsample {index}: {predicted.sum()} of {predicted.size} labels count")
        table = Table.grid(padding=(0, 2))
        for key, value in sample.items():
            if key in _TOKENS:
                table.add_row(key, _pieces(key, value, predicted, task.predicts_in_place, task.tokenizer))
            elif key != "target_spans":
                table.add_row(key, _runs(value))
        yield table
    if hint := _padding_hint(task):
        yield Text(f"\n{hint}")


def _pieces(key: str, ids: np.ndarray, predicted: np.ndarray, marked: bool, tokenizer: Tokenizer) -> Text:
    """Pieces with spaces between; «pieces» of the input that must be predicted are marked."""
    shown = [_visible(piece) for piece in tokenizer.pieces(ids.tolist())]
    if key == "labels":
        shown = [piece if counts else _LEFT_OUT for piece, counts in zip(shown, predicted, strict=True)]
    elif marked:
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


def _padding_hint(task: LanguageTask) -> str | None:
    """What to set where every target is mostly padding, which costs as much as tokens do."""
    filled, length = task.filled_target, task.model.target_length
    if filled in (None, length):
        return None
    return f"{(length - filled) / length:.0%} of every target is padding; model.decoder_seq_length={filled} is enough."
