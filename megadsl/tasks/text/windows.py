"""Sliding windows of a context that is longer than a sequence, and the best spans over all windows of a question. numpy only.

As BERT's run_squad does (arXiv 1810.04805): windows start doc_stride tokens apart; a window that does not hold the whole answer is
labelled with its marker, which also stands for "no answer". Among windows that hold an answer, the score of a span is start + end.

Letters: n tokens of a window.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class WindowIndex:
    """Sample number -> (row, first context token, tokens of the context); samples of a row stand side by side.

    Attributes:
        rows: [samples] row of each sample.
        begins: [samples] first token of the context that it holds.
    """

    rows: np.ndarray
    begins: np.ndarray

    @classmethod
    def of(cls, questions: np.ndarray, contexts: np.ndarray, length: int, markers: int, max_query: int, stride: int) -> "WindowIndex":
        """`questions` and `contexts`: tokens of each row; `length` of a sequence, of which `markers` are taken."""
        room = length - markers - np.minimum(questions, max_query)
        counts = 1 + np.ceil(np.maximum(contexts - room, 0) / np.minimum(stride, room)).astype(np.int64)
        rows = np.repeat(np.arange(len(contexts)), counts)
        within = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
        return cls(rows, within * np.minimum(stride, room)[rows])

    def __len__(self) -> int:
        return len(self.rows)


@dataclass(frozen=True)
class Span:
    """A span of a row's context: tokens `first` to `last`, and its score."""

    score: float
    first: int
    last: int


def best_spans(start: np.ndarray, end: np.ndarray, offset: int, begin: int, tokens: int, n_best: int, longest: int) -> list[Span]:
    """The n_best likeliest spans of one window, best first.

    Args:
        start, end: [n] scores.
        offset: where the context begins in the window; it has `tokens` of it, the first of which is number `begin` of the context.
        longest: tokens of a span at most.
    """
    inner = slice(offset, offset + tokens)
    starts, ends = np.argsort(-start[inner], kind="stable")[:n_best], np.argsort(-end[inner], kind="stable")[:n_best]
    first, last = np.meshgrid(starts, ends, indexing="ij")
    fits = (last >= first) & (last - first < longest)
    scores = (start[inner][first] + end[inner][last])[fits]
    order = np.argsort(-scores, kind="stable")[:n_best]
    return [Span(float(scores[i]), begin + int(first[fits][i]), begin + int(last[fits][i])) for i in order]
