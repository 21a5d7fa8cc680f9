"""Moments of tensors of many layers at once, on their device: rows are collected a few layers at a time and measured together.

A measured step is dominated by the number of operations, not by their size, where layers are thin; so a hook copies one sample of
its tensor and everything else is done for a block of layers in a handful of operations. Memory is bounded by BLOCK_BYTES.

Shape letters: r rows (layers of a block), s sequence, b samples, h hidden, q sampled queries, t keys, n heads, g query groups, d head
size, f FFN size.
"""

import math
from collections.abc import Callable

import numpy as np
import torch

BLOCK_BYTES = 32 << 20
BLOCK_ROWS = 32
# A unit is dead where no sampled token takes it above this share of what the units of its layer reach on average.
DEAD = 1e-4
UNSEEN = 1e30  # off a logit that a query does not see; finite, so that a query that sees nothing has no NaN


class Rows:
    """Tensors of one shape from consecutive places, handed to `measure` a block at a time.

    Args:
        measure: (places, their tensors stacked [r, ...]), called with at most BLOCK_ROWS of them.
        carry: so many rows of the last block come again, first, in the next one.
    """

    def __init__(self, measure: Callable[[list[int], tuple[torch.Tensor, ...], int], None], carry: int = 0):
        self._measure, self._carry = measure, carry
        self._capacity = 0
        self._shapes: tuple[torch.Size, ...] = ()
        self._places: list[int] = []
        self._copies: list[tuple[torch.Tensor, ...]] = []
        self._carried = 0

    def add(self, place: int, *tensors: torch.Tensor) -> None:
        """Copy the tensors of one place: a pipeline's buffers are written again before the block is measured."""
        shapes = tuple([tensor.shape for tensor in tensors])
        if shapes != self._shapes:
            self.flush()
            self._shapes = shapes
            size = sum(t.numel() * t.element_size() for t in tensors)
            self._capacity = self._carry + max(1, min(BLOCK_ROWS, BLOCK_BYTES // max(1, size)))
        self._copies.append(tuple([tensor.clone() for tensor in tensors]))
        self._places.append(place)
        if len(self._places) == self._capacity:
            self._emit(self._carry)

    def flush(self) -> None:
        """Measure what is left."""
        self._emit(0)

    def _emit(self, carry: int) -> None:
        if len(self._places) > self._carried:
            self._measure(self._places, tuple(torch.stack(rows) for rows in zip(*self._copies, strict=True)), self._carried)
        first = len(self._places) - carry
        self._places, self._copies, self._carried = self._places[first:], self._copies[first:], carry


def stream_sums(x: torch.Tensor, real: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """x [r, s, b, h], real [s, b] (1: no padding; None: none).

    Returns:
        ([r, 5]: sums of squares, of overlaps of two different positions, of values, and how many numbers and pairs (times h) they
        run over; [r, s, b]: the norm of every token).
    """
    r, s, b, h = x.shape
    norms = torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32)
    if real is None:
        total, squares = x.sum(dim=1, dtype=torch.float32), norms.square().sum(dim=(1, 2))
        lengths = norms.new_full((b,), float(s))
    else:
        total, squares = (x * real[..., None]).sum(dim=1, dtype=torch.float32), (norms.square() * real).sum(dim=(1, 2))
        lengths = real.sum(dim=0)
    overlap = torch.linalg.vector_norm(total, dim=(1, 2)).square() - squares
    counts = torch.stack((lengths.sum() * h, (lengths * (lengths - 1)).sum() * h)).expand(r, 2)
    return torch.cat((torch.stack((squares, overlap, total.sum(dim=(1, 2))), dim=1), counts), dim=1).double(), norms


def stream_means(sums: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The first result of `stream_sums`, added up, [p, 5] -> second moment, mean and token correlation, each [p]; NaN where there is none."""
    square, overlap, total, count, pairs = sums.T
    second = divided(square, count)
    return second, divided(total, count), divided(divided(overlap, pairs), second)


def divided(numerators: np.ndarray, denominators: np.ndarray) -> np.ndarray:
    """The quotients; NaN where the denominator is not positive."""
    return np.divide(numerators, denominators, out=np.full(len(numerators), np.nan), where=denominators > 0)


def angles(x: torch.Tensor, x_norms: torch.Tensor, y: torch.Tensor, y_norms: torch.Tensor, real: torch.Tensor | None) -> torch.Tensor:
    """[r, s, b, h] twice, with their norms [r, s, b] -> [r, 2]: sum over tokens of the angle between them over pi, number of tokens."""
    cosine = ((x * y).sum(dim=-1, dtype=torch.float32) / (x_norms * y_norms)).clamp(-1.0, 1.0)
    angle = torch.arccos(cosine) / math.pi
    real = torch.ones_like(angle[0]) if real is None else real
    return torch.stack(((angle * real).sum(dim=(1, 2)), real.sum().expand(len(x))), dim=1).double()


def attention_sums(query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None, seen: torch.Tensor, scale: float) -> tuple:
    """Logits of sampled queries of one sequence.

    Args:
        query: [r, q, n, d].
        key: [r, t, g, d].
        mask: added to the scores, [1 or n, q, t]; None: nothing.
        seen: [q, t] bool, which keys a query sees.

    Returns:
        ([r, 3]: sums over heads and queries of the logits' variance and of entropy / log(keys seen), and how many, of queries that
        see two keys or more; [r]: the largest logit).
    """
    r, q, n, d = query.shape
    key = key.float().repeat_interleave(n // key.size(2), dim=2)
    logits = torch.einsum("rqnd,rtnd->rnqt", query.float(), key) * scale
    if mask is not None:
        logits = logits + torch.where(seen, mask.float(), 0.0)
    variance, entropy, largest, counted = logit_moments(logits, seen)
    sums = torch.stack(((variance * counted).sum(dim=(1, 2)), (entropy * counted).sum(dim=(1, 2)), (counted.sum() * n).expand(r)), dim=1)
    return sums.double(), largest.amax(dim=(1, 2))


def logit_moments(logits: torch.Tensor, seen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """logits [..., q, t], which keys a query sees [..., q, t] bool -> by query, [..., q]: the variance of its logits, the entropy of its
    weights over the log of the number of keys seen, its largest logit, and 1 where it sees two keys or more (of the others only the
    largest counts)."""
    keys, shown = seen.sum(dim=-1), seen.to(logits.dtype)
    # Multiplied and added, not filled in: masked_fill costs five times as much on a CPU.
    visible, hidden = logits * shown, logits + (shown - 1.0) * UNSEEN
    mean = visible.sum(dim=-1) / keys.clamp(min=1)
    variance = torch.linalg.vecdot(visible, visible) / keys.clamp(min=1) - mean.square()
    weights, largest = hidden.softmax(dim=-1), hidden.amax(dim=-1)
    entropy = largest - weights.amax(dim=-1).log() - torch.linalg.vecdot(weights, visible)  # log of the sum of exp(logits) - mean logit
    return variance, entropy / keys.clamp(min=2).log(), largest, (keys > 1).float()


def dead_sums(reached: torch.Tensor) -> torch.Tensor:
    """reached [r, f]: the largest |activation| of every unit -> [r, 2]: dead units, units."""
    dead = reached <= DEAD * reached.mean(dim=1, keepdim=True)
    return torch.stack((dead.sum(dim=1).double(), torch.full((len(reached),), float(reached.size(1)), device=reached.device).double()), dim=1)
