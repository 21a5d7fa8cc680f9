"""A dataset folder: Megatron's mmap files of every split and what they were made from.

    DIR/train.bin .idx   validation.bin .idx   test.bin .idx     token ids, one sequence a document, eod at its end
    DIR/tokenizer.model                                          the tokenizer that made it
    DIR/stats.json                                               token statistics (statistics.py)
    DIR/index/                                                   where samples begin, per run's seed and lengths (index_cache.py)
    DIR/dataset.json                                             written last: without it the folder is no dataset
"""

from pathlib import Path
from typing import NamedTuple

from megadsl.data.atomic_files import read_json, sizes_match
from megadsl.errors import UserError

MANIFEST, STATISTICS, TOKENIZER, INDEX = "dataset.json", "stats.json", "tokenizer.model", "index"
FORMAT = 1
_KEYS = {"file_bytes", "splits", "tokenizer_sha256"}


class Window(NamedTuple):
    """`length` new tokens and `overlap` tokens that the next window of the stream holds too."""

    length: int
    overlap: int = 0


def load_dataset(folder: Path, tokenizer_sha256: str | None = None) -> dict:
    """The dataset.json of a complete dataset folder; UserError where it is missing, damaged or of another tokenizer."""
    manifest = read_json(folder / MANIFEST)
    way_out = f"megadsl data preprocess --output {folder}"
    if manifest is None or manifest.get("format") != FORMAT:
        raise UserError(f"{folder} is no dataset; make one with {way_out}, or set data.datasets to another folder.")
    if not _KEYS <= manifest.keys() or not sizes_match(folder, manifest["file_bytes"]):
        raise UserError(f"The dataset {folder} is damaged (a file is missing or cut short); make it again with {way_out}")
    if tokenizer_sha256 not in (None, manifest["tokenizer_sha256"]):
        raise UserError(
            f"The dataset {folder} was made with another tokenizer ({manifest['tokenizer_sha256'][:12]}, not "
            f"{tokenizer_sha256[:12]}); set tokenizer.model={folder / TOKENIZER} or make the dataset again with this tokenizer."
        )
    return manifest


def require_tokens(folder: Path, manifest: dict, split: str, window: Window) -> None:
    """UserError unless `split` holds the raw tokens of one sample."""
    tokens = manifest["splits"][split]["tokens"]
    if tokens < sum(window):
        raise UserError(
            f"The {split} split of {folder} holds {tokens} tokens, less than one sequence, which needs {sum(window)}; use "
            "more text (or smaller documents: megadsl data corpus --max-document-chars), or a smaller model.seq_length."
        )
