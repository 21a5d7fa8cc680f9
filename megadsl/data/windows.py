"""Raw windows of a token stream, through megatron.core.datasets, for every objective: window i is a function of (seed, i).

GPTDataset cuts one epoch into windows in an order fixed by the seed; Windows repeats it for ever, in a new permutation each
epoch; Blend mixes several by weight. A window is {"window": ids [length + overlap]}. GPTDataset fits SentencePiece as it is:
it asks of a tokenizer only the ids of pad and of a document's end, and it needs no process group.
"""

import logging
import sys
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import megadsl.parallel.device  # noqa: F401  isort: skip  (before Megatron-core)
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.utils import Split

from megadsl.data.atomic_files import fingerprint
from megadsl.data.dataset import Window, require_tokens
from megadsl.data.index_cache import cached_arrays
from megadsl.data.tokenizer import Tokenizer

_MEGATRON_SPLITS = {"train": Split.train, "validation": Split.valid, "test": Split.test}
# Megatron warns once per dataset that its own cache is off; here that is meant (see _config).
logging.getLogger("megatron.core.datasets").setLevel(logging.ERROR)


class _Epoch(GPTDataset):
    """GPTDataset whose index is cached and mapped (index_cache.py)."""

    def __init__(self, folder: Path, key: dict, *arguments):
        self._folder, self._key = folder, key
        super().__init__(*arguments)

    def _build_document_sample_shuffle_indices(self) -> tuple[np.ndarray, ...]:
        parts = ("document_index", "sample_index", "shuffle_index")
        return cached_arrays(self._folder, self._key["split"], self._key, parts, super()._build_document_sample_shuffle_indices)


class Windows(torch.utils.data.Dataset):
    """One split of one dataset folder, endless: window i is number i mod n of epoch i // n, for n windows an epoch.

    `cached` False: the index is built in memory, for a reader that comes once.
    """

    def __init__(self, folder: Path, manifest: dict, split: str, window: Window, seed: int, tokenizer: Tokenizer,
                 cached: bool = True):
        require_tokens(folder, manifest, split, window)
        prefix = str(folder / split)
        config = _config(prefix, window, seed, tokenizer)
        indexed = GPTDataset.build_low_level_dataset(prefix, config)
        documents = np.arange(len(indexed), dtype=np.int32)
        self.folder = folder
        self.index_key = {
            "dataset": fingerprint(manifest), "split": split, "window": list(window), "seed": config.random_seed,
            "megatron": version("megatron-core"),
        }
        arguments = (indexed, prefix, documents, None, _MEGATRON_SPLITS[split], config)
        self._epoch = _Epoch(folder, self.index_key, *arguments) if cached else GPTDataset(*arguments)
        self._seed = seed
        self._overlap = window.overlap
        self.samples_per_epoch = len(self._epoch)
        # Asked for by BlendedDataset.
        self.index_split = self._epoch.index_split
        self.config = config
        self.unique_identifiers = self._epoch.unique_identifiers
        # Two epochs are kept: a global batch may lie across their border.
        self._permutation = lru_cache(maxsize=2)(self._permutation_of)

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        epoch, position = divmod(int(index), self.samples_per_epoch)
        if epoch:
            position = int(self._permutation(epoch)[position])
        sample = self._epoch[position]
        tokens = sample["tokens"].numpy()
        return {"window": np.append(tokens, sample["labels"][-1].numpy()) if self._overlap else tokens}

    def _permutation_of(self, epoch: int) -> np.ndarray:
        # Epoch 0 has GPTDataset's own shuffle. RandomState's stream, unlike Generator's, is frozen over numpy versions.
        return np.random.RandomState([self._seed % 2**32, epoch]).permutation(self.samples_per_epoch)


class Blend(BlendedDataset):
    """Several Windows by weight. Megatron's rule (the source that lags most is next) makes it prefix-stable."""

    def __init__(self, parts: list[Windows], weights: list[float], size: int):
        super().__init__(parts, weights, size, parts[0].config)
        self.samples_per_epoch = sum(part.samples_per_epoch for part in parts)

    def _build_indices(self) -> tuple[np.ndarray, ...]:
        key = {"parts": [part.index_key for part in self.datasets], "weights": self.weights, "size": self.size}
        parts = ("dataset_index", "dataset_sample_index")
        return cached_arrays(self.datasets[0].folder, f"blend-{key['parts'][0]['split']}", key, parts, super()._build_indices)


def _config(prefix: str, window: Window, seed: int, tokenizer: Tokenizer) -> GPTDatasetConfig:
    return GPTDatasetConfig(
        random_seed=seed % 2**32, sequence_length=window.length, add_extra_token_to_sequence=bool(window.overlap),
        tokenizer=tokenizer, blend=([prefix], None), split="1",
        reset_position_ids=False, reset_attention_mask=False, eod_mask_loss=False, create_attention_mask=False,
        path_to_cache="",  # none of Megatron's own (index_cache.py says why); None would not mean that
    )
