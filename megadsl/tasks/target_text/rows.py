"""TSV files of examples (fairseq's manifests: a header, tab-separated, no quotes), with one sentence for every row that is bad.

`BadRows` is where bad rows end: the first one ends the command, or they are counted and left out (--skip-bad-rows).
"""

import difflib
import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megadsl.errors import UserError

SPLITS = ("train", "validation", "test")
# Names that other toolkits give to the splits.
_SPLIT_NAMES = {**{name: name for name in SPLITS}, "dev": "validation", "valid": "validation", "val": "validation"}


@dataclass(frozen=True)
class Row:
    """One row; `where` is "FILE, row N" (the header is row 1)."""

    where: str
    values: dict[str, str]


class BadRows:
    """What happens to rows that cannot be used: `skip` counts them by reason, else the first one is a UserError."""

    def __init__(self, skip: bool):
        self._skip = skip
        self.reasons: Counter[str] = Counter()

    def add(self, where: str, reason: str, detail: str = "") -> None:
        """`reason` continues the sentence "FILE, row N ..."; `detail` is what differs from row to row."""
        if not self._skip:
            raise UserError(f"{where} {reason}{f' ({detail})' if detail else ''}; mend the row, or leave such rows out with --skip-bad-rows.")
        self.reasons[reason] += 1

    @property
    def count(self) -> int:
        return self.reasons.total()


def read_rows(path: Path, required: tuple[str, ...], optional: tuple[str, ...], bad: BadRows) -> Iterator[Row]:
    """Rows of a TSV file as {column: text}, stripped; a row with another number of fields goes to `bad`.

    Raises:
        UserError: the file cannot be read, or its header lacks a column or has one that nobody knows.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as UTF-8 text ({error}); give a TSV file.") from error
    columns = lines[0].rstrip("\r").split("\t")
    known = (*required, *optional)
    for column in required:
        if column not in columns:
            raise UserError(f"{path} has no column {column} (its header: {', '.join(columns)}); needed are {', '.join(required)}.")
    for column in columns:
        if column not in known:
            near = difflib.get_close_matches(column, known, n=1, cutoff=0.0)[0]
            raise UserError(f"{path}, row 1: the column {column!r} is not known; did you mean {near}? (known: {', '.join(known)})")
    for number, line in enumerate(lines[1:], 2):
        fields = line.rstrip("\r").split("\t")
        if fields == [""]:
            continue
        if len(fields) != len(columns):
            bad.add(f"{path}, row {number}", f"has not {len(columns)} fields")
            continue
        yield Row(f"{path}, row {number}", {column: field.strip() for column, field in zip(columns, fields, strict=True)})


def split_of(row: Row, key: str, fractions: tuple[float, float, float]) -> str | None:
    """The split that a row names, else one by the hash of `key` in the proportions (train, validation, test); None: unknown name.

    Equal keys fall into one split, so that no sentence of the test split is learnt.
    """
    if named := row.values.get("split"):
        return _SPLIT_NAMES.get(named)
    place = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64
    bounds = fractions[0], fractions[0] + fractions[1]
    return SPLITS[sum(place >= bound for bound in bounds)]


def checked_fractions(validation: float, test: float) -> tuple[float, float, float]:
    """(train, validation, test); UserError where they are no shares."""
    train = 1.0 - validation - test
    if min(validation, test) < 0 or train <= 0:
        raise UserError("--validation-fraction and --test-fraction must not be negative and must leave something to train on.")
    return train, validation, test
