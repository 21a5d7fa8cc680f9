"""The order of training examples: a pure function of (seed, sample number), with examples of similar length in a global batch.

An epoch is a permutation by (seed, epoch). It is cut into pools of some global batches; each pool is sorted by length and cut into
global batches, whose order is then shuffled (length bucketing). The number of samples in a batch stays fixed, since the engine
counts consumed samples; how many frames or tokens a batch holds varies. Up to a global batch less one of the examples are left
out of an epoch, others each time, so that batches stay aligned. Nothing of it depends on ranks or micro-batches.
"""

import numpy as np

from megadsl.data.epoch_order import EpochOrder

_ORDER = 0x0D  # tells this random stream from those of samples


class BucketedOrder(EpochOrder):
    """The order of an epoch, in global batches of similar length.

    Args:
        lengths: [n] of every example.
        pool: global batches that are sorted together; 0: no bucketing.
    """

    def __init__(self, lengths: np.ndarray, seed: int, global_batch_size: int, pool: int):
        whole = len(lengths) - len(lengths) % global_batch_size
        super().__init__(whole or len(lengths), seed)
        self._lengths, self._batch, self._pool = lengths, global_batch_size, pool
        self._bucketed = bool(whole and pool)

    def _permutation(self, epoch: int) -> np.ndarray:
        rng = np.random.RandomState([self._seed, epoch % 2**32, _ORDER])
        order = rng.permutation(len(self._lengths))[:self.samples_per_epoch]
        if not self._bucketed:
            return order
        size, batches = self._pool * self._batch, []
        for start in range(0, len(order), size):
            pool = order[start:start + size]
            pool = pool[np.argsort(self._lengths[pool], kind="stable")]
            batches += np.split(pool, len(pool) // self._batch)
        return np.concatenate([batches[index] for index in rng.permutation(len(batches))])
