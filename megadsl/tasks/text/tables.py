"""Rows of sentences from tables: GLUE's TSV layouts of MNLI, QQP, SST-2 and STS-B, and plain CSV, TSV or JSONL.

GLUE's TSV files quote nothing: a quotation mark is a character of the text. CSV follows RFC 4180.
"""

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from megadsl.errors import UserError
from megadsl.tasks.text.bad_rows import BadRow, BadRows, text_of
from megadsl.tasks.text.prepared import Row

SUFFIXES = (".tsv", ".csv", ".jsonl")


@dataclass(frozen=True)
class Layout:
    """Names of columns: one or two of text, and the label's; `value`: the label is a number to predict."""

    texts: tuple[str, ...]
    label: str
    value: bool = False


LAYOUTS = {
    "mnli": Layout(("sentence1", "sentence2"), "gold_label"),
    "qqp": Layout(("question1", "question2"), "is_duplicate"),
    "sst2": Layout(("sentence",), "label"),
    "stsb": Layout(("sentence1", "sentence2"), "score", value=True),
    "pair": Layout(("text", "text2"), "label"),
    "plain": Layout(("text",), "label"),
}


def read_table(path: Path, bad: BadRows) -> tuple[list[str], Iterator[tuple[int, dict]]]:
    """(columns, (row number, fields) of every row that can be read) of a .tsv, .csv or .jsonl file; UserError where it cannot be."""
    try:
        file = path.open(encoding="utf-8-sig", newline="")
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}).") from error
    if path.suffix == ".jsonl":
        return _json_lines(path, file, bad)
    if path.suffix not in SUFFIXES:
        raise UserError(f"{path} is no {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]} file.")
    quoting = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if path.suffix == ".tsv" else {}
    csv.field_size_limit(1 << 24)
    reader = csv.reader(file, **quoting)
    columns = next(reader, [])

    def rows() -> Iterator[tuple[int, dict]]:
        with file:
            for number, values in enumerate(reader, start=1):
                if not values:
                    continue
                with bad.at(path, number):
                    if len(values) != len(columns):
                        raise BadRow(f"it has {len(values)} fields, but the header has {len(columns)}")
                    yield number, dict(zip(columns, values, strict=True))

    return columns, rows()


def _json_lines(path: Path, file, bad: BadRows) -> tuple[list[str], Iterator[tuple[int, dict]]]:
    def rows() -> Iterator[tuple[int, dict]]:
        with file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    with bad.at(path, number):
                        yield number, _object(line)

    with path.open(encoding="utf-8-sig") as first:
        line = next((line for line in first if line.strip()), "{}")
    try:
        columns = list(_object(line))
    except BadRow:
        columns = []
    return columns, rows()


def _object(line: str) -> dict:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise BadRow(f"it is no JSON ({error})") from error
    if not isinstance(value, dict):
        raise BadRow("it is no JSON object")
    return value


def layout_of(path: Path, columns: list[str], name: str, texts: tuple[str, ...], label: str | None) -> Layout:
    """The layout by name, or the first one whose columns are all there ("auto"); columns that are given replace its own.

    Raises:
        UserError: a column is not there.
    """
    fits = (layout for layout in LAYOUTS.values() if {*layout.texts, layout.label} <= set(columns))
    layout = LAYOUTS.get(name) or (None if texts and label else next(fits, None)) or LAYOUTS["plain"]
    layout = replace(layout, texts=texts or layout.texts, label=label or layout.label)
    for column in (*layout.texts, layout.label):
        if column not in columns:
            raise UserError(f"{path} has no column {column}, only {', '.join(columns) or 'none'}; name its columns with --text and --label, or another --layout.")
    return layout


def read_rows(path: Path, layout: Layout, labels: list[str] | None, rows: Iterator[tuple[int, dict]], bad: BadRows) -> Iterator[Row]:
    """The rows of one table.

    Args:
        labels: names that may occur; None: a value is read.
    """
    numbers = None if labels is None else {name: number for number, name in enumerate(labels)}
    for number, fields in rows:
        with bad.at(path, number):
            texts = [text_of(fields.get(column), f"column {column}") for column in layout.texts]
            yield Row(texts, label_of(fields.get(layout.label), layout.label, numbers))


def label_of(value, column: str, numbers: dict[str, int] | None) -> float | int:
    """A label's number, or a value; BadRow where it is not one."""
    if numbers is None:
        try:
            found = float(value)
        except (TypeError, ValueError):
            found = float("nan")
        if found != found or found in (float("inf"), float("-inf")):
            raise BadRow(f"column {column} holds {value!r:.40}, which is no finite number")
        return found
    name = label_name(value)
    if name not in numbers:
        known = ", ".join(list(numbers)[:8]) + ", ..." * (len(numbers) > 8)
        raise BadRow(f"column {column} holds the label {name!r:.40}, which is not one of {known}")
    return numbers[name]


def label_name(value) -> str:
    """How a label is written: JSON's 1 and "1" are the same."""
    return "" if value is None else str(value).strip()
