"""A dataset folder: Megatron's mmap files of every split and what they were made from.

    DIR/train.bin .idx   validation.bin .idx   test.bin .idx     token ids, one sequence a document, eod at its end
    DIR/tokenizer.model                                          the tokenizer that made it
    DIR/stats.json                                               token statistics (statistics.py)
    DIR/index/                                                   where samples begin, per run's seed and lengths (index_cache.py)
    DIR/dataset.json                                             written last: without it the folder is no dataset
"""

from pathlib import Path

from megadsl.config import Config
from megadsl.data.lengths import Window, check_objective, raw_window
from megadsl.data.atomic_files import read_json, sizes_match
from megadsl.data.tokenizer import Tokenizer
from megadsl.errors import UserError

MANIFEST, STATISTICS, TOKENIZER, INDEX = "dataset.json", "stats.json", "tokenizer.model", "index"
FORMAT = 1
_KEYS = {"file_bytes", "splits", "tokenizer_sha256"}


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


def check_datasets(config: Config) -> Tokenizer:
    """Load the tokenizer and check every dataset of the run; in milliseconds, without torch."""
    if not config.data.datasets:
        raise UserError("data.datasets is empty; name a folder of megadsl data preprocess, for example data.datasets=DIR.")
    tokenizer = Tokenizer.load(config.tokenizer.model)
    check_objective(config, tokenizer)
    window = raw_window(config)
    splits = ("train", "validation") if config.training.eval_iters else ("train",)
    for dataset in config.data.datasets:
        folder = Path(dataset.path)
        manifest = load_dataset(folder, tokenizer.sha256)
        for split in splits:
            require_tokens(folder, manifest, split, window)
    return tokenizer
