"""What the model reads of one or more texts: markers between them, cut to length. numpy only.

An encoder reads <cls> A <sep> B <sep>, as BERT does; a decoder A <eod> B <eod>, whose last token has seen all. Token types: 0 up to
the first marker behind A, 1 for the rest.
"""

from dataclasses import dataclass

import numpy as np

from megadsl.data.tokenizer import Tokenizer
from megadsl.errors import UserError

# At least so much of a text is kept.
SHORTEST = 4


@dataclass(frozen=True)
class Markers:
    """Ids around texts; `first` is None in a decoder."""

    first: int | None
    between: int

    @classmethod
    def of(cls, tokenizer: Tokenizer, family: str) -> "Markers":
        return cls(None, tokenizer.eod) if family == "decoder" else cls(tokenizer.cls, tokenizer.sep)

    def count(self, texts: int) -> int:
        return texts + (self.first is not None)


@dataclass(frozen=True)
class Sequence:
    """tokens [n] and types [n]; `offsets`: where each text begins."""

    tokens: np.ndarray
    types: np.ndarray
    offsets: tuple[int, ...]


def sequence_of(texts: list[np.ndarray], markers: Markers, length: int) -> Sequence:
    """Texts with markers, cut to `length`: from the longest text, at its end, as long as it is the longest."""
    texts = cut_longest(texts, length - markers.count(len(texts)))
    tokens: list[int] = [] if markers.first is None else [markers.first]
    offsets, first_end = [], None
    for text in texts:
        offsets.append(len(tokens))
        tokens += [*text.tolist(), markers.between]
        first_end = len(tokens) if first_end is None else first_end
    types = np.ones(len(tokens), dtype=np.int64)
    types[:first_end] = 0
    return Sequence(np.array(tokens, dtype=np.int64), types, tuple(offsets))


def cut_longest(texts: list[np.ndarray], room: int) -> list[np.ndarray]:
    """The texts with at most `room` tokens together: the longest ones share what is missing."""
    lengths = np.array([len(text) for text in texts])
    if lengths.sum() <= room:
        return texts
    # The largest common limit under which they fit, and what is left of the room one by one from the front.
    low, high = 0, int(lengths.max())
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if np.minimum(lengths, middle).sum() <= room else (low, middle - 1)
    kept = np.minimum(lengths, low)
    for index in np.flatnonzero(lengths > low)[:room - int(kept.sum())]:
        kept[index] += 1
    return [text[:count] for text, count in zip(texts, kept, strict=True)]


def cut_first(texts: list[np.ndarray], room: int) -> list[np.ndarray]:
    """The same, but the first text (a passage) is cut before the others are."""
    others = sum(len(text) for text in texts[1:])
    if others + SHORTEST <= room:
        return [texts[0][:room - others], *texts[1:]]
    return cut_longest(texts, room)


def require_room(length: int, texts: int, markers: Markers) -> None:
    """UserError unless `length` leaves something of every text."""
    needed = markers.count(texts) + texts * SHORTEST
    if length < needed:
        raise UserError(f"model.seq_length {length} is too short for {texts} texts and their markers; set model.seq_length to at least {needed}.")
