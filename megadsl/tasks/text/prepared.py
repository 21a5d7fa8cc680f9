"""A prepared folder: rows of texts that `megadsl data text` has tokenised, with their labels. Without torch.

    DIR/SPLIT.tokens.npy     token ids of all parts, one after the other
    DIR/SPLIT.starts.npy     where part p of row i begins: entry i * parts + p, and the end
    DIR/SPLIT.labels.npy     a number a row: of its label, its right option, or the value to predict; (first, last) answer token of
                             the context in span questions, -1 where there is none
    DIR/SPLIT.characters.npy DIR/SPLIT.texts.jsonl   span questions: what characters a token covers, and the texts themselves
    DIR/tokenizer.model      the tokenizer that made it
    DIR/text.json            written last: without it the folder is none

Arrays are memory-mapped, so what a run does not read costs nothing.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from megadsl.data.atomic_files import file_sha256, fingerprint, make_folder, read_json, sizes_match, write_json, written_atomically
from megadsl.data.dataset import TOKENIZER
from megadsl.data.tokenizer import Tokenizer
from megadsl.errors import UserError

MANIFEST = "text.json"
FORMAT = 1
SPLITS = ("train", "validation", "test")
WAY_OUT = "make one with megadsl data text"


@dataclass
class Row:
    """One sample.

    Attributes:
        parts: its texts: one or two sentences; passage, question and options; question and context.
        label: number of its label or right option, or the value to predict.
        answers: span questions: (first character, text) of every answer in the context; empty: it has none.
        name: span questions: the id.
    """

    parts: list[str]
    label: float | None = None
    answers: list[tuple[int, str]] = field(default_factory=list)
    name: str = ""


@dataclass(frozen=True)
class SplitArrays:
    """The arrays of one split; all of a row's parts lie side by side."""

    folder: Path
    split: str
    parts: int

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def tokens(self) -> np.ndarray:
        return self._array("tokens")

    @cached_property
    def starts(self) -> np.ndarray:
        return self._array("starts")

    @cached_property
    def labels(self) -> np.ndarray:
        return self._array("labels")

    @cached_property
    def characters(self) -> np.ndarray:
        return self._array("characters")

    @cached_property
    def texts(self) -> list[dict]:
        """Span questions: {"id", "context", "answers"} of every row."""
        lines = (self.folder / f"{self.split}.texts.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]

    def part(self, row: int, part: int) -> np.ndarray:
        """Token ids [n] of one text."""
        begin, end = self.starts[row * self.parts + part:row * self.parts + part + 2]
        return np.asarray(self.tokens[begin:end], dtype=np.int64)

    def characters_of(self, row: int, part: int) -> np.ndarray:
        """[n, 2] first character and end of every token of one text."""
        begin, end = self.starts[row * self.parts + part:row * self.parts + part + 2]
        return np.asarray(self.characters[begin:end])

    def _array(self, name: str) -> np.ndarray:
        return np.load(self.folder / f"{self.split}.{name}.npy", mmap_mode="r")


class PreparedText:
    """A prepared folder that is complete.

    Raises:
        UserError: there is none, it is damaged, of another task or another tokenizer.
    """

    def __init__(self, folder: Path, kind: str, tokenizer_sha256: str | None = None):
        self.folder = folder
        manifest = read_json(folder / MANIFEST)
        if manifest is None or manifest.get("format") != FORMAT:
            raise UserError(f"{folder} is no folder of prepared texts; {WAY_OUT} {kind}, or set data.datasets to another folder.")
        if not sizes_match(folder, {name: entry["bytes"] for name, entry in manifest["files"].items()}):
            raise UserError(f"The prepared folder {folder} is damaged (a file is missing or cut short); make it again with megadsl data text {kind}.")
        if manifest["kind"] != kind:
            raise UserError(f"{folder} was prepared by megadsl data text {manifest['kind']}, but this task reads what megadsl data text {kind} makes.")
        if tokenizer_sha256 not in (None, manifest["tokenizer_sha256"]):
            raise UserError(
                f"{folder} was prepared with another tokenizer ({manifest['tokenizer_sha256'][:12]}, not {tokenizer_sha256[:12]}); set "
                f"tokenizer.model={folder / TOKENIZER} or prepare it again with this tokenizer.")
        self.manifest = manifest

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the labels in the order of their numbers; empty where a value is predicted, or for other kinds."""
        return tuple(self.manifest["labels"])

    def rows(self, split: str) -> int:
        return self.manifest["splits"].get(split, 0)

    def split(self, name: str) -> SplitArrays:
        """UserError where the folder has no such split."""
        if not self.rows(name):
            there = ", ".join(split for split, rows in self.manifest["splits"].items() if rows)
            raise UserError(f"{self.folder} has no {name} split, only {there}; name another split, or prepare it from sources that have one.")
        return SplitArrays(self.folder, name, self.manifest["parts"])

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.manifest)


def write_prepared(folder: Path, kind: str, splits: dict[str, list[Row]], tokenizer: Tokenizer, labels: Iterable[str], facts: dict) -> dict:
    """Write a prepared folder; its manifest.

    Args:
        facts: what the manifest shall also say (sources, rows that were left out, whether a value is predicted).
    """
    make_folder(folder)
    (folder / MANIFEST).unlink(missing_ok=True)
    parts = max((len(row.parts) for rows in splits.values() for row in rows), default=1)
    for split, rows in splits.items():
        if rows:
            _write_split(folder, split, rows, parts, tokenizer, kind == "questions")
    (folder / TOKENIZER).write_bytes(tokenizer.content)
    names = sorted(path.name for path in folder.iterdir() if path.name.split(".")[0] in SPLITS or path.name == TOKENIZER)
    files = {name: {"bytes": (folder / name).stat().st_size, "sha256": file_sha256(folder / name)} for name in names}
    manifest = {
        "format": FORMAT, "kind": kind, "parts": parts, "labels": list(labels), "splits": {split: len(rows) for split, rows in splits.items()},
        "tokenizer_sha256": tokenizer.sha256, **facts, "files": files,
    }
    write_json(folder / MANIFEST, manifest)
    return manifest


def _write_split(folder: Path, split: str, rows: list[Row], parts: int, tokenizer: Tokenizer, spans: bool) -> None:
    ids, starts, labels, characters = [], [0], [], []
    for row in rows:
        for text in row.parts:
            if spans:
                own, covered = tokenizer.encode_with_characters(text)
                characters.append(np.array(covered, dtype=np.int32).reshape(-1, 2))
            else:
                own = tokenizer.encode(text)
            ids.append(np.array(own, dtype=np.int32))
            starts.append(starts[-1] + len(own))
        labels.append(_answer_tokens(row, characters[-1]) if spans else row.label)
    kind = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.int32
    arrays = {"tokens": np.concatenate(ids).astype(kind), "starts": np.array(starts, dtype=np.int64), "labels": np.array(labels)}
    if spans:
        arrays["characters"] = np.concatenate(characters)
        with written_atomically(folder / f"{split}.texts.jsonl") as temporary, temporary.open("w", encoding="utf-8") as file:
            for row in rows:
                answers = [text for _, text in row.answers]
                file.write(json.dumps({"id": row.name, "context": row.parts[1], "answers": answers}, ensure_ascii=False) + "\n")
    for name, array in arrays.items():
        with written_atomically(folder / f"{split}.{name}.npy") as temporary, temporary.open("wb") as file:
            np.save(file, array)


def _answer_tokens(row: Row, characters: np.ndarray) -> tuple[int, int]:
    """(first, last) token of the context that the first answer touches; (-1, -1) without one."""
    if not row.answers:
        return -1, -1
    begin, text = row.answers[0]
    touched = np.flatnonzero((characters[:, 1] > begin) & (characters[:, 0] < begin + len(text)))
    return int(touched[0]), int(touched[-1])
