"""Text to evaluate on: all tokens of a text or of a dataset's split as one stream, and rows to compare an exported model on."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import megadsl.parallel.device  # noqa: F401  isort: skip  (before Megatron-core)
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megadsl.data.dataset import load_dataset
from megadsl.data.sources import Report, find_files, read_documents
from megadsl.data.tokenizer import Tokenizer
from megadsl.errors import UserError

if TYPE_CHECKING:
    import torch

EXPORT_TOKENS = 256


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


def tokens_of_text(source: str, tokenizer: Tokenizer) -> tuple[np.ndarray, int]:
    """(token ids with end-of-document after each document, bytes of text) of a source that megadsl.data.sources reads."""
    ids, size = [], 0
    for file in find_files([source]):
        for document in read_documents(file, text_key="text", max_document_chars=1 << 30, report=Report()):
            ids += [*tokenizer.encode(document), tokenizer.eod]
            size += len(document.encode())
    return np.asarray(ids, dtype=np.int64), size


def export_rows(tokenizer: Tokenizer, length: int, start: int = 0) -> "torch.Tensor":
    """Two rows of at most EXPORT_TOKENS tokens of real text: [2, s]."""
    import torch

    text = Path(os.__file__).read_text(encoding="utf-8")  # the standard library's: every machine has it
    ids = torch.tensor(tokenizer.encode(text[:40 * EXPORT_TOKENS]))
    length = min(length, EXPORT_TOKENS, (len(ids) - start) // 2)
    return ids[start:start + 2 * length].view(2, length).clone()
