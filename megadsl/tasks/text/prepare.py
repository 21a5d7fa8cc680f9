"""Sources -> a prepared folder: which file is which split, which labels there are, which rows are left out.

A source is a folder with a file (or, RACE, a folder) a split, or one file. Without a validation split a tenth of the rows each becomes
validation and test, chosen by the hash of their texts: the same rows on every machine, and none in two splits.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from megadsl.data.tokenizer import Tokenizer
from megadsl.errors import UserError
from megadsl.tasks.text.bad_rows import BadRows
from megadsl.tasks.text.choices import read_choices
from megadsl.tasks.text.prepared import SPLITS, PreparedText, Row, write_prepared
from megadsl.tasks.text.squad import read_squad
from megadsl.tasks.text.tables import SUFFIXES, label_name, layout_of, read_rows, read_table

# GLUE's test splits have no labels; MNLI's second development set is the better test.
_NAMES = {
    "train": ("train",), "validation": ("validation", "dev", "dev_matched", "valid", "val"), "test": ("dev_mismatched", "test"),
}
_TENTHS = ("validation", "test", *("train",) * 8)


@dataclass(frozen=True)
class Sources:
    """Where the splits of a folder or file lie.

    Raises:
        UserError: there is no training split.
    """

    files: dict[str, Path]

    @classmethod
    def of(cls, source: Path, validation: Path | None, test: Path | None, suffixes: tuple[str, ...]) -> "Sources":
        """`suffixes`: of files; "" for folders. `validation` and `test` are files given beside `source`."""
        files: dict[str, Path] = {}
        if source.is_dir():
            candidates = {split: [source / f"{name}{suffix}" for name in names for suffix in suffixes] for split, names in _NAMES.items()}
            files = {split: found for split, paths in candidates.items() if (found := next((p for p in paths if p.exists()), None))}
        elif source.exists():
            files = {"train": source}
        files |= {split: path for split, path in (("validation", validation), ("test", test)) if path is not None}
        if "train" not in files:
            raise UserError(f"{source} is no file and no folder with {' or '.join(f'train{suffix}' for suffix in suffixes)}.")
        for path in files.values():
            if not path.exists():
                raise UserError(f"There is no {path}.")
        return cls(files)


def prepare_classification(sources: Sources, tokenizer: Tokenizer, output: Path, bad: BadRows, *, layout: str = "auto", texts: tuple[str, ...] = (),
                           label: str | None = None, labels: tuple[str, ...] = (), value: bool = False) -> dict:
    """Rows of one or two sentences; the manifest.

    Args:
        labels: their names in order; empty: those of the training split, sorted.
        value: the label is a number to predict (so it is in STS-B's layout).
    """
    tables, left_out = {}, []
    for split, path in sources.files.items():
        columns, rows = read_table(path, bad)
        if split == "test" and "train" in tables:
            wanted = tables["train"][1]
            if wanted.label not in columns:
                left_out.append(f"{path} has no column {wanted.label}")
                continue
        tables[split] = path, layout_of(path, columns, layout, texts, label), list(rows)
    value = value or tables["train"][1].value
    if not labels and not value:
        names = {label_name(fields.get(tables["train"][1].label)) for _, fields in tables["train"][2]}
        labels = tuple(sorted(names - {""}))
    splits = {split: list(read_rows(path, own, None if value else list(labels), iter(rows), bad)) for split, (path, own, rows) in tables.items()}
    if not value and len(labels) < 2:
        raise UserError(f"{sources.files['train']} holds fewer than two labels ({', '.join(labels) or 'none'}); there is nothing to tell apart.")
    return _write(output, "classification", splits, sources, tokenizer, bad, labels, {"value": value, "left_out": left_out})


def prepare_choices(sources: Sources, tokenizer: Tokenizer, output: Path, bad: BadRows, *, num_options: int | None = None) -> dict:
    """Rows of passage, question and options; the manifest."""
    splits: dict[str, list[Row]] = {}
    for split, path in sources.files.items():
        splits[split] = list(read_choices(path, num_options, bad))
        if splits[split] and num_options is None:
            num_options = len(splits[split][0].parts) - 2
    return _write(output, "choices", splits, sources, tokenizer, bad, (), {})


def prepare_questions(sources: Sources, tokenizer: Tokenizer, output: Path, bad: BadRows) -> dict:
    """Rows of question and context; the manifest."""
    splits = {split: list(read_squad(path, bad)) for split, path in sources.files.items()}
    unanswerable = sum(not row.answers for rows in splits.values() for row in rows)
    return _write(output, "questions", splits, sources, tokenizer, bad, (), {"unanswerable": unanswerable})


PREPARE: dict[str, tuple[Callable[..., dict], tuple[str, ...]]] = {
    "classification": (prepare_classification, SUFFIXES), "choices": (prepare_choices, (".jsonl", "")),
    "questions": (prepare_questions, (".json", "-v2.0.json", "-v1.1.json")),
}


def _write(output: Path, kind: str, splits: dict[str, list[Row]], sources: Sources, tokenizer: Tokenizer, bad: BadRows,
           labels: tuple[str, ...], facts: dict) -> dict:
    if not splits["train"]:
        raise UserError(f"{sources.files['train']} holds no row that can be used" + (f" ({bad.first})." if bad.first else "."))
    if "validation" not in splits:
        rows, given = splits.pop("train"), splits
        splits = {split: [] for split in SPLITS}
        for row in rows:
            split = _tenth(row)
            splits["train" if split in given else split].append(row)
        splits |= given
    facts |= {"sources": {split: str(path) for split, path in sources.files.items()}, "skipped_rows": bad.count, "first_skipped": bad.first}
    write_prepared(output, kind, splits, tokenizer, labels, facts)
    return PreparedText(output, kind).manifest


def _tenth(row: Row) -> str:
    # Questions on one passage stay together: its text is what is told apart.
    key = row.parts[-1] if row.name else row.parts[0] or row.parts[1]
    return _TENTHS[int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") % 10]


def describe(manifest: dict) -> Iterator[str]:
    """What `megadsl data text` prints of what it made."""
    rows = ", ".join(f"{split} {count:,}" for split, count in manifest["splits"].items())
    labels = f" | labels {', '.join(manifest['labels'][:8])}" + ", ..." * (len(manifest["labels"]) > 8) if manifest["labels"] else ""
    yield f"{manifest['kind']}: rows {rows}{labels}"
    if manifest["skipped_rows"]:
        yield f"  {manifest['skipped_rows']} rows were left out; the first: {manifest['first_skipped']}"
    for line in manifest.get("left_out", []):
        yield f"  left out: {line}"
