"""Which of a list of examples stands at which place of an endless training run, and which ones stand for all of them. Without torch."""

import numpy as np


class EpochOrder:
    """Sample number -> number of the example, for ever: a permutation of the examples for every epoch, a function of seed and epoch alone.

    Args:
        samples_per_epoch: how many samples an epoch has.
    """

    def __init__(self, samples_per_epoch: int, seed: int):
        self.samples_per_epoch, self._seed = samples_per_epoch, seed % 2**32
        self._epoch: tuple[int, np.ndarray] | None = None

    def __getitem__(self, index: int) -> int:
        epoch, place = divmod(index, self.samples_per_epoch)
        if self._epoch is None or self._epoch[0] != epoch:
            self._epoch = epoch, self._permutation(epoch)
        return int(self._epoch[1][place])

    def _permutation(self, epoch: int) -> np.ndarray:
        return np.random.RandomState([self._seed, epoch]).permutation(self.samples_per_epoch)


def evenly_spread(total: int, count: int) -> list[int]:
    """At most `count` of the numbers below `total`, each in the middle of an equal share."""
    count = min(count, total)
    return [(2 * index + 1) * total // (2 * count) for index in range(count)]
