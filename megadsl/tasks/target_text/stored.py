"""A dataset folder of a task that writes texts: target token ids, texts and ids of the examples, and the manifest with checksums.

    FOLDER/NAME.json         manifest, written last: what it was made from, counts, files with their bytes and SHA-256
    FOLDER/tokenizer.model   SentencePiece model of the targets
    FOLDER/targets.npz       by split: ids (all targets behind each other) and ends [examples]
    FOLDER/texts.jsonl       {"id", "split", "tgt_text"} of every example, in order
plus what the task's sources need.
"""

import io
import json
import zipfile
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from megadsl.checkpoint.manifest import record_of
from megadsl.data.atomic_files import fingerprint, make_folder, read_json, sizes_match, write_json, written_atomically
from megadsl.data.tokenizer import Tokenizer
from megadsl.data.tokenizer_training import train_on_lines
from megadsl.errors import UserError
from megadsl.tasks.target_text.rows import SPLITS

FORMAT = 1
TOKENIZER, TARGETS, TEXTS = "tokenizer.model", "targets.npz", "texts.jsonl"


class TokenLists:
    """Token ids of every example by split in one .npz: ids, all behind each other, and ends [examples]."""

    def __init__(self, path: Path):
        with np.load(path) as file:
            self._arrays = dict(file)

    @staticmethod
    def write(path: Path, splits: dict[str, Sequence[Sequence[int]]]) -> None:
        arrays = {}
        for split, lists in splits.items():
            arrays[f"{split}_ids"] = np.array([token for one in lists for token in one], np.int32)
            arrays[f"{split}_ends"] = np.cumsum([len(one) for one in lists], dtype=np.int64)
        write_arrays(path, arrays)

    def of(self, split: str, index: int) -> np.ndarray:
        """Token ids of an example: [t]."""
        ends = self._arrays[f"{split}_ends"]
        return self._arrays[f"{split}_ids"][ends[index - 1] if index else 0:ends[index]]

    def lengths(self, split: str) -> np.ndarray:
        """[examples]."""
        return np.diff(self._arrays[f"{split}_ends"], prepend=0)


class TextExamples:
    """What is there of every example beside its source, as lists in the order of the rows."""

    def __init__(self):
        self.ids: list[str] = []
        self.splits: list[str] = []
        self.texts: list[str] = []
        self.where: list[str] = []

    def add(self, example: str, split: str, text: str, where: str) -> None:
        """`where`: file and row."""
        self.ids.append(example)
        self.splits.append(split)
        self.texts.append(text)
        self.where.append(where)

    def __len__(self) -> int:
        return len(self.ids)

    def of(self, split: str) -> list[int]:
        """Numbers of the examples of a split."""
        return [index for index, name in enumerate(self.splits) if name == split]


def earlier_dataset(output: Path, name: str, inputs: object) -> dict | None:
    """The manifest of a dataset that was made from the same inputs and is still whole."""
    earlier = read_json(output / f"{name}.json")
    if not earlier or earlier.get("inputs_hash") != fingerprint([FORMAT, inputs]):
        return None
    return earlier if sizes_match(output, {file: record["bytes"] for file, record in earlier["files"].items()}) else None


def begin_dataset(output: Path, name: str) -> None:
    """An empty place: what is there of an earlier dataset does not count any more."""
    make_folder(output)
    (output / f"{name}.json").unlink(missing_ok=True)


def write_targets(output: Path, examples: TextExamples, tokenizer: Path | None, vocab_size: int, model_type: str,
                  more_lines: Sequence[str] = ()) -> Tokenizer:
    """Tokenizer (given, or trained on the targets of the train split and on `more_lines`), target ids and texts.

    Raises:
        UserError: the train split is empty, or too small for the vocabulary.
    """
    train = [examples.texts[index] for index in examples.of("train")]
    if not train:
        raise UserError("No row is in the train split; give more rows, or another column split.")
    with written_atomically(output / TOKENIZER) as temporary:
        if tokenizer is None:
            temporary.write_bytes(train_on_lines([*train, *more_lines], vocab_size, model_type, num_sentinels=0))
        else:
            temporary.write_bytes(Tokenizer.load(tokenizer).content)
    loaded = Tokenizer.load(output / TOKENIZER)
    TokenLists.write(output / TARGETS, {split: [loaded.encode(examples.texts[index]) for index in examples.of(split)] for split in SPLITS})
    with written_atomically(output / TEXTS) as temporary, temporary.open("w", encoding="utf-8") as file:
        for example, split, text in zip(examples.ids, examples.splits, examples.texts, strict=True):
            file.write(json.dumps({"id": example, "split": split, "tgt_text": text}, ensure_ascii=False) + "\n")
    return loaded


def write_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """An .npz whose bytes depend on the arrays alone; numpy's own holds the time of day, and a dataset is known by its checksum."""
    with written_atomically(path) as temporary, zipfile.ZipFile(temporary, "w") as file:
        for name, array in arrays.items():
            content = io.BytesIO()
            np.lib.format.write_array(content, array, allow_pickle=False)
            file.writestr(zipfile.ZipInfo(f"{name}.npy"), content.getvalue())


def finish_dataset(output: Path, name: str, inputs: object, values: dict, files: Sequence[str]) -> dict:
    """Write the manifest: `values`, and bytes and checksums of the files."""
    records = {file: record_of(output / file) for file in (TOKENIZER, TARGETS, TEXTS, *files)}
    manifest = {
        "format": FORMAT, "inputs_hash": fingerprint([FORMAT, inputs]), **values,
        "files": {file: {"bytes": record.bytes, "sha256": record.sha256} for file, record in records.items()},
    }
    write_json(output / f"{name}.json", manifest)
    return manifest


class StoredTexts:
    """A dataset folder as it is read: manifest, target ids by example, texts."""

    def __init__(self, folder: Path, name: str, maker: str):
        """`name` of the manifest, `maker` the command that makes such folders."""
        self.folder = folder
        manifest = read_json(folder / f"{name}.json")
        if not manifest or manifest.get("format") != FORMAT:
            raise UserError(f"{folder} is no dataset of {maker} (it has no {name}.json); make one with {maker} ... --output {folder}.")
        self.manifest = manifest
        for file, record in manifest["files"].items():
            if not sizes_match(folder, {file: record["bytes"]}):
                raise UserError(f"{folder / file} is missing or has not the {record['bytes']} bytes of its manifest; make the dataset anew with {maker}.")

    @property
    def fingerprint(self) -> str:
        return fingerprint({file: record["sha256"] for file, record in self.manifest["files"].items()})

    def require_tokenizer(self, tokenizer: Tokenizer) -> None:
        own = self.manifest["files"][TOKENIZER]["sha256"]
        if tokenizer.sha256 != own:
            raise UserError(f"{self.folder} was made with another tokenizer than {tokenizer.name}; set tokenizer.model={self.folder / TOKENIZER}.")

    def size(self, split: str) -> int:
        return self.manifest["splits"][split]["examples"]

    @cached_property
    def _targets(self) -> TokenLists:
        return TokenLists(self.folder / TARGETS)

    def target(self, split: str, index: int) -> np.ndarray:
        """Token ids, without bos and eos: [t]."""
        return self._targets.of(split, index)

    def target_lengths(self, split: str) -> np.ndarray:
        return self._targets.lengths(split)

    def texts(self, split: str) -> list[dict[str, str]]:
        """{"id", "tgt_text"} of every example of a split."""
        with (self.folder / TEXTS).open(encoding="utf-8") as file:
            return [row for row in map(json.loads, file) if row["split"] == split]
