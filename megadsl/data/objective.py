"""The training data of a run: raw windows, and the objective of the model's family that makes a sample of each.

Sample i of a split is a pure function of (training.seed, i): neither the layout, nor the micro-batch, nor the readers, nor the
length of the run changes it. i counts on over the epochs, so a window that comes again is masked anew.
"""

from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from megadsl.config import Config
from megadsl.data.causal import Causal
from megadsl.data.dataset import TOKENIZER, load_dataset
from megadsl.data.denoising import Infilling, SpanCorruption
from megadsl.data.keys import batch_keys
from megadsl.data.lengths import check_objective, raw_window
from megadsl.data.masked import Masked
from megadsl.data.tokenizer import Tokenizer
from megadsl.data.windows import Blend, Windows

# (raw window [n] int64, the sample's own random stream) -> arrays by name
Objective = Callable[[np.ndarray, np.random.RandomState], dict[str, np.ndarray]]


def objective_of(config: Config, tokenizer: Tokenizer) -> Objective:
    """What `model.family` and section `data` ask the model to predict; UserError where tokenizer or lengths do not allow it."""
    check_objective(config, tokenizer)
    if config.model.family == "decoder":
        return Causal(config, tokenizer)
    if config.model.family == "encoder":
        return Masked(config, tokenizer)
    return (SpanCorruption if config.data.denoising == "span_corruption" else Infilling)(config, tokenizer)


class Samples(torch.utils.data.Dataset):
    """The samples of one split, as long as its windows: tensors named and ordered by `batch_keys`."""

    def __init__(self, windows: Windows | Blend, objective: Objective, seed: int, keys: tuple[str, ...]):
        self._windows, self._objective, self._seed, self._keys = windows, objective, seed % 2**32, keys
        self.samples_per_epoch = windows.samples_per_epoch

    def __len__(self) -> int:
        return len(self._windows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        index = int(index)
        # RandomState takes words of 32 bits. Three of them, so that this is no stream of Windows' permutations.
        rng = np.random.RandomState([self._seed, index % 2**32, index >> 32])
        sample = self._objective(self._windows[index]["window"], rng)
        return {key: torch.as_tensor(sample[key]) for key in self._keys}


class Datasets:
    """The splits of a run; each is opened when it is first asked for."""

    def __init__(self, config: Config, tokenizer_sha256: str, train_samples: int | None):
        self._config = config
        batch = config.training.global_batch_size
        self._train_samples = config.training.train_iters * batch if train_samples is None else train_samples
        self._evaluation_samples = config.training.eval_iters * batch
        self._folders = [Path(dataset.path) for dataset in config.data.datasets]
        self._manifests = [load_dataset(folder, tokenizer_sha256) for folder in self._folders]
        # All folders have this tokenizer.
        self._tokenizer = Tokenizer.load(self._folders[0] / TOKENIZER)
        self._objective = objective_of(config, self._tokenizer)

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
        seed, window = self._config.training.seed, raw_window(self._config)
        parts = [
            Windows(folder, manifest, split, window, seed, self._tokenizer)
            for folder, manifest in zip(self._folders, self._manifests, strict=True)
        ]
        weights = [dataset.weight for dataset in self._config.data.datasets]
        windows = parts[0] if len(parts) == 1 else Blend(parts, weights, size=max(1, samples))
        return Samples(windows, self._objective, seed, batch_keys(self._config))


def open_datasets(config: Config, tokenizer_sha256: str, train_samples: int | None = None) -> Datasets:
    """The datasets of `config.data`; UserError where a folder is missing, damaged or of another tokenizer."""
    return Datasets(config, tokenizer_sha256, train_samples)
