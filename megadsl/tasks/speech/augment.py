"""SpecAugment (arXiv 1904.08779) without time warping: bands of bins and stretches of time set to the mean, which is 0."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class SpecAugment:
    """Masks of up to `frequency_width` bins, and of up to `time_width` frames and `time_share` of the utterance."""

    frequency_masks: int
    frequency_width: int
    time_masks: int
    time_width: int
    time_share: float

    def __call__(self, frames: np.ndarray, rng: np.random.RandomState) -> np.ndarray:
        """frames [n, bins] -> a masked copy, decided by `rng` alone."""
        masked, (length, bins) = frames.copy(), frames.shape
        for _ in range(self.frequency_masks):
            width = rng.randint(0, self.frequency_width + 1)
            first = rng.randint(0, max(1, bins - width))
            masked[:, first:first + width] = 0
        longest = min(self.time_width, int(self.time_share * length))
        for _ in range(self.time_masks):
            width = rng.randint(0, longest + 1)
            first = rng.randint(0, max(1, length - width))
            masked[first:first + width] = 0
        return masked
