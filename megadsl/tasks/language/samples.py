"""Samples of a language-modelling task: raw windows of a dataset, and the objective that makes a sample of each.

Sample i of a split is a pure function of (training.seed, i): neither the layout, nor the micro-batch, nor the readers, nor the
length of the run changes it. i counts on over the epochs, so a window that comes again is masked anew.
"""

from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from megadsl.config import Config
from megadsl.data.dataset import TOKENIZER, Window, load_dataset
from megadsl.data.epoch_order import evenly_spread
from megadsl.data.tokenizer import Tokenizer
from megadsl.data.windows import Blend, Windows
from megadsl.tasks.task import Splits

# (raw window [n] int64, the sample's own random stream) -> arrays by name
Objective = Callable[[np.ndarray, np.random.RandomState], dict[str, np.ndarray]]

_EVALUATION_SEED = 20240309  # any number, the same for all evaluations


class Samples(torch.utils.data.Dataset):
    """The samples of one split, as long as its windows: tensors by name, in the order of `names`."""

    def __init__(self, windows: Windows | Blend, objective: Objective, seed: int, names: tuple[str, ...]):
        self._windows, self._objective, self._seed, self._names = windows, objective, seed % 2**32, names
        self.samples_per_epoch = windows.samples_per_epoch

    def __len__(self) -> int:
        return len(self._windows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        index = int(index)
        # RandomState takes words of 32 bits. Three of them, so that this is no stream of Windows' permutations.
        rng = np.random.RandomState([self._seed, index % 2**32, index >> 32])
        sample = self._objective(self._windows[index]["window"], rng)
        return {name: torch.as_tensor(sample[name]) for name in self._names}


class LanguageSplits(Splits):
    """The splits of a run; each is opened when it is first asked for."""

    def __init__(self, config: Config, objective: Objective, window: Window, names: tuple[str, ...], train_samples: int,
                 tokenizer_sha256: str):
        self._config, self._objective, self._window, self._names = config, objective, window, names
        self._train_samples = train_samples
        self._evaluation_samples = config.training.eval_iters * config.training.global_batch_size
        self._folders = [Path(dataset.path) for dataset in config.data.datasets]
        self._manifests = [load_dataset(folder, tokenizer_sha256) for folder in self._folders]
        # All folders have this tokenizer.
        self._tokenizer = Tokenizer.load(self._folders[0] / TOKENIZER)

    @cached_property
    def train(self) -> Samples:
        return self._open("train", self._train_samples)

    @cached_property
    def validation(self) -> Samples:
        return self._open("validation", self._evaluation_samples)

    @cached_property
    def test(self) -> Samples:
        return self._open("test", self._evaluation_samples)

    def _open(self, split: str, samples: int) -> Samples:
        seed = self._config.training.seed
        parts = [
            Windows(folder, manifest, split, self._window, seed, self._tokenizer)
            for folder, manifest in zip(self._folders, self._manifests, strict=True)
        ]
        weights = [dataset.weight for dataset in self._config.data.datasets]
        windows = parts[0] if len(parts) == 1 else Blend(parts, weights, size=max(1, samples))
        return Samples(windows, self._objective, seed, self._names)


class StreamSamples(torch.utils.data.Dataset):
    """Samples for evaluation: windows of a stream of tokens that do not overlap, in order, each seeded by its number, so that
    they are the same for every model of one shape. A rest that is shorter than a window is left out.

    Args:
        tokens: [t] int64.
    """

    def __init__(self, tokens: np.ndarray, objective: Objective, length: int):
        self._tokens, self._objective, self._length = tokens, objective, length

    def __len__(self) -> int:
        return self._tokens.size // self._length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        window = self._tokens[index * self._length:(index + 1) * self._length]
        sample = self._objective(window, np.random.RandomState([_EVALUATION_SEED, index]))
        return {name: torch.as_tensor(array) for name, array in sample.items()}


class Spread(torch.utils.data.Dataset):
    """`count` samples of a dataset, evenly spread over it: an evaluation of a part must not depend on where the part lies."""

    def __init__(self, samples: torch.utils.data.Dataset, count: int):
        self._samples, self._indices = samples, evenly_spread(len(samples), count)

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self._samples[self._indices[index]]
