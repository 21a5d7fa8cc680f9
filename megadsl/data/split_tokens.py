"""All tokens of a dataset's split as one stream."""

from pathlib import Path

import numpy as np
import megadsl.parallel.device  # noqa: F401  isort: skip  (before Megatron-core)
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megadsl.data.dataset import load_dataset
from megadsl.errors import UserError


def tokens_of_split(folder: Path, split: str, tokenizer_sha256: str) -> tuple[np.ndarray, int]:
    """(all token ids of a split, bytes of text they stand for) of a dataset folder."""
    manifest = load_dataset(folder, tokenizer_sha256)
    if split not in manifest["splits"]:
        raise UserError(f"{folder} has no split '{split}'; it has {', '.join(manifest['splits'])}.")
    if not manifest["splits"][split]["tokens"]:
        raise UserError(f"The split '{split}' of {folder} is empty; choose another split.")
    indexed = IndexedDataset(str(folder / split))
    parts = [np.asarray(indexed[index], dtype=np.int64) for index in range(len(indexed))]
    return (np.concatenate(parts) if parts else np.empty(0, np.int64)), manifest["splits"][split]["text_bytes"]
