"""Text to evaluate on: all tokens of a text as one stream, and rows to compare an exported model on."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from megadsl.data.sources import Report, find_files, read_documents
from megadsl.data.tokenizer import Tokenizer

if TYPE_CHECKING:
    import torch

EXPORT_TOKENS = 256


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
