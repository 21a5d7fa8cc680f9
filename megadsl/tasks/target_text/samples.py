"""Samples of a task that writes texts: a source and target token ids, by split.

Sample i of training is a pure function of (training.seed, i): which example it is (order.py), and what is done to its source. i counts
on over the epochs, so an utterance that comes again is masked anew.
"""

from collections.abc import Callable

import numpy as np
import torch

from megadsl.data.epoch_order import evenly_spread
from megadsl.tasks.target_text.order import BucketedOrder
from megadsl.tasks.target_text.stored import StoredTexts
from megadsl.tasks.task import Splits

# (split, example, its own random stream or None where nothing is left to chance) -> arrays of the source by name
Source = Callable[[str, int, np.random.RandomState | None], dict[str, np.ndarray]]


class Examples(torch.utils.data.Dataset):
    """The examples of one split in their order, as {name: tensor}: the source's, and "target" [t] without bos and eos.

    Args:
        count: the first so many.
    """

    def __init__(self, stored: StoredTexts, split: str, source: Source, count: int):
        self._stored, self._split, self._source, self._count = stored, split, source, count

    def __len__(self) -> int:
        return self._count

    def arrays(self, index: int, rng: np.random.RandomState | None = None) -> dict[str, np.ndarray]:
        return {**self._source(self._split, index, rng), "target": self._stored.target(self._split, index).astype(np.int64)}

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {name: torch.as_tensor(array) for name, array in self.arrays(int(index)).items()}


class TrainingSamples(torch.utils.data.Dataset):
    """Endless training samples."""

    def __init__(self, examples: Examples, order: BucketedOrder, seed: int):
        self._examples, self._order, self._seed = examples, order, seed % 2**32
        self.samples_per_epoch = order.samples_per_epoch

    def __len__(self) -> int:
        return 2**40

    def arrays(self, index: int) -> dict[str, np.ndarray]:
        # Three words of 32 bits, as RandomState takes them.
        rng = np.random.RandomState([self._seed, index % 2**32, index >> 32])
        return self._examples.arrays(self._order[index], rng)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {name: torch.as_tensor(array) for name, array in self.arrays(int(index)).items()}


class Repeated(torch.utils.data.Dataset):
    """Examples over and over: validation reads a fixed number of samples, which may be more than there are."""

    def __init__(self, examples: Examples):
        self._examples = examples

    def __len__(self) -> int:
        return 2**40

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self._examples[int(index) % len(self._examples)]


class TextSplits(Splits):
    """`train`, endless, and `validation` for the trainer; `test` and `examples(split)`, each example once, for evaluation."""

    def __init__(self, train: TrainingSamples, examples: dict[str, Examples]):
        self.train, self._examples = train, examples
        self.validation, self.test = Repeated(examples["validation"]), examples["test"]

    def examples(self, split: str) -> Examples:
        return self._examples[split]


class Chosen(torch.utils.data.Dataset):
    """Some examples of a split, by their numbers."""

    def __init__(self, examples: Examples, numbers: list[int]):
        self._examples, self.numbers = examples, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self._examples[self.numbers[index]]


def by_length(examples: Examples, lengths: np.ndarray, count: int | None) -> Chosen:
    """`count` examples evenly spread over a split (None: all), sorted by length so that batches hold little padding."""
    return Chosen(examples, sorted(evenly_spread(len(examples), count or len(examples)), key=lambda number: int(lengths[number])))
