"""Position-resolved second moments on a coarse grid, and what a mask does to them.

The state of a stack is the Gram matrix of its n positions, an n x n matrix. Along the sequence it varies smoothly, so positions
are put in blocks (single ones at the start, then blocks of a fixed relative size): `off[a, b]` is the mean overlap of two
*different* positions from blocks a and b, `diag[a]` the mean second moment in block a. With all blocks of size 1 everything below
is exact; a bidirectional stack without position structure is one single block and exact as well. This turns O(n^3) a sublayer
into O(blocks^3).

Letters: n positions, m_a size of block a, B blocks. Source: THEORY.md, section 6b; the block form is derived here.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Grid:
    """Positions 1..n in consecutive blocks: `sizes` m_a, `starts` (positions before the block)."""

    sizes: np.ndarray
    starts: np.ndarray

    @property
    def length(self) -> int:
        return int(self.sizes.sum())

    @property
    def centres(self) -> np.ndarray:
        """Mean position (1-based) of every block."""
        return self.starts + 0.5 * (self.sizes + 1.0)

    def spread(self, values: np.ndarray) -> np.ndarray:
        """Block values -> one value per position, linear between block centres."""
        return np.interp(np.arange(1, self.length + 1), self.centres, values)


def block_means(grid: Grid, values: np.ndarray) -> np.ndarray:
    """One value per position -> their mean in every block."""
    return np.add.reduceat(values, grid.starts.astype(int)) / grid.sizes


def uniform_grid(length: int) -> Grid:
    """One block: positions that cannot be told apart (bidirectional attention)."""
    return Grid(np.array([float(length)]), np.zeros(1))


def causal_grid(length: int, ratio: float = 0.08, single: int = 12) -> Grid:
    """Single positions at the start, where causal attention changes fast, then blocks of about `ratio` times their position.

    ratio = 0 keeps every position.
    """
    sizes, position = [], 0
    while position < length:
        size = 1 if position < single else max(1, int(ratio * position))
        sizes.append(min(size, length - position))
        position += sizes[-1]
    sizes = np.array(sizes, dtype=float)
    return Grid(sizes, np.cumsum(sizes) - sizes)


@dataclass
class Gram:
    """Second moments of a sequence: `off` [B, B] between different positions, `diag` [B] of a position with itself."""

    off: np.ndarray
    diag: np.ndarray

    def scaled(self, rows: np.ndarray) -> "Gram":
        """Every position multiplied by its factor in `rows` [B]."""
        return Gram(self.off * np.outer(rows, rows), self.diag * rows ** 2)

    def plus(self, other: "Gram", mine: float, its: float) -> "Gram":
        """mine * self + its * other."""
        return Gram(mine * self.off + its * other.off, mine * self.diag + its * other.diag)


def means(grid: Grid, gram: Gram) -> tuple[float, float]:
    """(mean second moment over positions, mean overlap over pairs of different positions)."""
    m, n = grid.sizes, grid.length
    second = float(m @ gram.diag) / n
    if n == 1:
        return second, second
    pairs = float(m @ gram.off @ m) - float(m @ np.diagonal(gram.off))
    return second, pairs / (n * (n - 1.0))


def stationary(grid: Grid, values: np.ndarray) -> np.ndarray:
    """Block means [B, B] over different positions of a function of their distance; `values` [n] at distances 0..n-1.

    The double sum over a pair of blocks is four reads of the twice-summed function.
    """
    n = grid.length
    once = np.cumsum(np.concatenate([values[:0:-1], values]))          # index k + n - 1 holds the sum up to distance k
    twice = np.concatenate([[0.0], np.cumsum(once)])                   # index k + n holds the sum of `once` up to k
    low, high = grid.starts.astype(int), (grid.starts + grid.sizes).astype(int)
    total = np.zeros((len(low), len(low)))
    for sign, edge in ((1.0, low), (-1.0, high)):
        # sum over i in [low, high) of F(i - edge): reads at i - edge - 1 for the lower end.
        total += sign * (twice[np.clip(high[:, None] - 1 - edge[None, :] + n, 0, 2 * n - 1)]
                         - twice[np.clip(low[:, None] - 1 - edge[None, :] + n, 0, 2 * n - 1)])
    m = grid.sizes
    pairs = np.outer(m, m)
    inner = np.arange(len(m))
    total[inner, inner] -= m * values[0]
    pairs[inner, inner] -= m
    single = pairs[inner, inner] == 0
    total[inner[single], inner[single]] = values[0]
    pairs[inner[single], inner[single]] = 1.0
    return total / pairs


def blocked(grid: Grid, matrix: np.ndarray) -> Gram:
    """Block means of a matrix [n, n] of overlaps between positions, second moments on its diagonal."""
    starts, m = grid.starts.astype(int), grid.sizes
    total = np.add.reduceat(np.add.reduceat(matrix, starts, axis=0), starts, axis=1)
    own = np.add.reduceat(np.diagonal(matrix), starts)
    pairs, inner = np.outer(m, m), np.arange(len(m))
    total[inner, inner] -= np.where(m > 1, own, 0.0)
    pairs[inner, inner] -= np.where(m > 1, m, 0.0)
    return Gram(total / pairs, own / m)


class Mask:
    """Which keys a query sees, on a query grid and a key grid: averages over visible keys, and the adjoint sums over queries.

    seen[a, b]: keys of block b that a query of block a sees, on average (itself included); count[a] = n_t, all its keys.
    smaller, larger [B, B]: min and max of the counts of two different queries.
    """

    def __init__(self, queries: Grid, keys: Grid, causal: bool):
        self.causal = causal
        m, blocks = keys.sizes, len(queries.sizes)
        if causal:
            self.seen = np.tril(np.tile(m, (blocks, 1)), -1) + np.diag(0.5 * (m + 1.0))
            self.count = queries.centres
            self._seers = np.tril(np.tile(m[:, None], (1, blocks)), -1) + np.diag(0.5 * (m + 1.0))
            self.smaller = np.minimum.outer(self.count, self.count)
            self.larger = np.maximum.outer(self.count, self.count)
            # Two different positions of one block: their minimum is a third into it on average, their maximum two thirds.
            inner = np.arange(blocks)
            many = m > 1
            self.smaller[inner[many], inner[many]] = (queries.starts + (m + 1.0) / 3.0)[many]
            self.larger[inner[many], inner[many]] = (queries.starts + 2.0 * (m + 1.0) / 3.0)[many]
            self._earlier = np.minimum.outer(np.arange(blocks), np.arange(blocks))
            self._later = np.maximum.outer(np.arange(blocks), np.arange(blocks))
        else:
            self.seen = np.tile(m, (blocks, 1))
            self.count = np.full(blocks, float(keys.length))
            self._seers = np.tile(queries.sizes[:, None], (1, len(m)))
            self.smaller = self.larger = np.full((blocks, blocks), float(keys.length))
        self._key_sizes, self._query_sizes = m, queries.sizes
        self._weights = self.seen / self.count[:, None]

    def average(self, keys: Gram) -> tuple[Gram, np.ndarray]:
        """Uniform attention: Gram of the averages over visible keys (P K P^T), and each row's mean key second moment [B]."""
        own = keys.diag - np.diagonal(keys.off)
        off = self._weights @ keys.off @ self._weights.T
        visible = self.seen @ own
        diag = np.diagonal(off) + visible / self.count ** 2
        product = np.outer(self.count, self.count)
        if self.causal:
            common = visible[self._earlier]
            blocks = np.arange(len(own))
            m = self._key_sizes
            common[blocks, blocks] -= np.where(m > 1, (m + 1.0) / 6.0, 0.0) * own
            return Gram(off + common / product, diag), self._weights @ keys.diag
        return Gram(off + visible[0] / product, diag), self._weights @ keys.diag

    def score_average(self, off: np.ndarray, diag: np.ndarray) -> np.ndarray:
        """Diagonal [B] of P K P^T only, for scores whose overlaps differ from those of the values (rotary positions)."""
        own = diag - np.diagonal(off)
        return np.einsum("ab,bc,ac->a", self._weights, off, self._weights) + (self.seen @ own) / self.count ** 2

    def gather(self, pairs: Gram) -> Gram:
        """Sums over the queries that see a key: M^T X M, for X given between queries. -> Gram between keys."""
        own = pairs.diag - np.diagonal(pairs.off)
        off = self._seers.T @ pairs.off @ self._seers
        later = self._seers.T @ own
        diag = np.diagonal(off) + later
        if not self.causal:
            return Gram(off + later[0], diag)
        common = later[self._later]
        blocks = np.arange(len(own))
        m = self._key_sizes
        common[blocks, blocks] -= np.where(m > 1, (m + 1.0) / 6.0, 0.0) * own
        return Gram(off + common, diag)

    def gather_both(self, pairs: Gram) -> np.ndarray:
        """Sums over query pairs that both see both keys: [B, B] between keys (the later key decides)."""
        diag = self.gather(pairs).diag
        return diag[self._later] if self.causal else np.full((len(diag), len(diag)), diag[0])
