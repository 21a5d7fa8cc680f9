"""A quantity over depth and time in a bounded number of columns, for heat maps: what is merged keeps its most extreme number.

Leaving columns out would lose the short spike that a heat map is looked at for.
"""

import numpy as np

COLUMNS = 256


class DepthTimeline:
    """Numbers by column, [points, columns], with the iteration at which each column starts; larger in magnitude is more extreme."""

    def __init__(self, points: int, columns: int = COLUMNS):
        self._columns = columns - columns % 2
        self._values = np.full((points, self._columns), np.nan, dtype=np.float32)
        self._starts: list[int] = []
        self._in_column, self._per_column = 0, 1  # records in the newest column, and in a full one
        self.latest = -1  # iteration of the newest record

    def add(self, iteration: int, row: np.ndarray) -> None:
        """row: [points]."""
        if self._starts and self._in_column < self._per_column:
            newest = len(self._starts) - 1
            self._values[:, newest] = more_extreme(self._values[:, newest], row)
        else:
            if len(self._starts) == self._columns:
                self._merge()
            self._values[:, len(self._starts)] = row
            self._starts.append(iteration)
            self._in_column = 0
        self._in_column += 1
        self.latest = iteration

    def _merge(self) -> None:
        half = self._columns // 2
        self._values[:, :half] = more_extreme(self._values[:, ::2], self._values[:, 1::2])
        self._values[:, half:] = np.nan
        self._starts, self._per_column = self._starts[::2], 2 * self._per_column

    @property
    def values(self) -> np.ndarray:
        """[points, columns so far]."""
        return self._values[:, :len(self._starts)].copy()

    @property
    def edges(self) -> np.ndarray:
        """Where columns begin, and where the last one ends: [columns + 1] iterations."""
        last = self._starts[-1]
        width = last - self._starts[-2] if len(self._starts) > 1 else 1
        return np.array([*self._starts, max(self.latest + 1, last + width)])


def more_extreme(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """By element, what is larger in magnitude; NaN only where both are."""
    b_counts = np.isnan(a) | (np.abs(b) > np.abs(a))
    return np.where(b_counts & ~np.isnan(b), b, a)


def pooled_rows(values: np.ndarray, rows: int) -> np.ndarray:
    """[points, columns] -> at most `rows` rows, neighbours merged to the more extreme, so that no single layer is lost in a picture."""
    merged = -(-len(values) // rows)
    if merged <= 1:
        return values
    padded = np.concatenate([values, np.full((-len(values) % merged, values.shape[1]), np.nan, dtype=values.dtype)])
    result = padded[::merged]
    for offset in range(1, merged):
        result = more_extreme(result, padded[offset::merged])
    return result
