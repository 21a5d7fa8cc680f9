"""A corpus folder: the documents of some sources, without duplicates, split by the hash of their content.

    DIR/train.jsonl.zst  validation.jsonl.zst  test.jsonl.zst     one {"source": ..., "text": ...} a line
    DIR/corpus.json                                               counts, report, sources, content hash; written last

Because the split follows the content, a document is in the same split wherever it comes from, and never in two.
"""

import hashlib
import io
import json
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

import zstandard

from megadsl.data.atomic_files import fingerprint, make_folder, read_json, sizes_match, write_json, written_atomically
from megadsl.data.progress_bar import progress
from megadsl.data.sources import Report, SourceFile, find_files, read_documents
from megadsl.errors import UserError

SPLITS = ("train", "validation", "test")
DEFAULT_FRACTIONS = (0.96, 0.02, 0.02)
DEFAULT_MAX_DOCUMENT_CHARS = 1_000_000
_FORMAT = 1


def build_corpus(
    sources: list[str], output: Path, *, text_key: str = "text", fractions: tuple[float, float, float] = DEFAULT_FRACTIONS,
    max_document_chars: int = DEFAULT_MAX_DOCUMENT_CHARS,
) -> tuple[dict, bool]:
    """Write the corpus folder `output`; gives its corpus.json and whether an earlier, equal one was used again."""
    if min(fractions) < 0 or abs(sum(fractions) - 1) > 1e-6:
        raise UserError(f"The fractions {fractions} of train, validation and test must not be negative and must add up to 1.")
    if max_document_chars < 1:
        raise UserError(f"max-document-chars is {max_document_chars} but must be at least 1.")
    files = find_files(sources, exclude=output)
    settings = {"format": _FORMAT, "text_key": text_key, "fractions": list(fractions), "max_document_chars": max_document_chars}
    stats = [(file.path, file.path.stat()) for file in files]
    inputs = fingerprint([settings, [(str(path.resolve()), stat.st_size, stat.st_mtime_ns) for path, stat in stats]])
    earlier = read_json(output / "corpus.json")
    if earlier and earlier.get("inputs_hash") == inputs and sizes_match(output, earlier["file_bytes"]):
        return earlier, True

    make_folder(output)
    (output / "corpus.json").unlink(missing_ok=True)
    manifest = {"sources": sources, "files": len(files), "inputs_hash": inputs, **settings}
    manifest |= _write_documents(files, sum(stat.st_size for _, stat in stats), output, settings)
    if not sum(split["documents"] for split in manifest["splits"].values()):
        raise UserError(f"The sources {' '.join(sources)} hold no document (is --text-key '{text_key}' right?).")
    write_json(output / "corpus.json", manifest)
    return manifest, False


def load_corpus(folder: Path) -> dict:
    """The corpus.json of a complete corpus folder."""
    manifest = read_json(folder / "corpus.json")
    if manifest is None or manifest.get("format") != _FORMAT:
        raise UserError(f"{folder} is no corpus; make one with: megadsl data corpus --output {folder}")
    if not sizes_match(folder, manifest["file_bytes"]):
        raise UserError(f"The corpus {folder} is damaged; make it again with: megadsl data corpus --output {folder}")
    return manifest


def read_split(folder: Path, split: str) -> Iterator[str]:
    """The documents of one split, in their fixed order."""
    return (json.loads(line)["text"] for line in read_lines(folder, split))


def read_lines(folder: Path, split: str) -> Iterator[str]:
    """The lines of one split, {"source": ..., "text": ...} each."""
    with (folder / _file_name(split)).open("rb") as raw:
        stream = io.TextIOWrapper(zstandard.ZstdDecompressor().stream_reader(raw), encoding="utf-8", newline="\n")
        yield from stream


def split_of(digest: bytes, fractions: tuple[float, ...]) -> str:
    """The split of a document, from the SHA-256 of its text."""
    position = int.from_bytes(digest[:8], "big") / 2**64
    for split, fraction in zip(SPLITS[:-1], fractions[:-1], strict=True):
        if position < fraction:
            return split
        position -= fraction
    return SPLITS[-1] if fractions[-1] else SPLITS[0]


def _write_documents(files: list[SourceFile], total_bytes: int, output: Path, settings: dict) -> dict:
    report, seen, content = Report(), set(), hashlib.sha256()
    splits = {split: {"documents": 0, "text_bytes": 0} for split in SPLITS}
    with ExitStack() as stack:
        writers = {}
        for split in SPLITS:
            raw = stack.enter_context(stack.enter_context(written_atomically(output / _file_name(split))).open("wb"))
            writers[split] = stack.enter_context(zstandard.ZstdCompressor(level=3).stream_writer(raw))
        advance = stack.enter_context(progress(f"corpus: {len(files)} files, {total_bytes / 1e6:.1f} MB", total_bytes))
        for file in files:
            for text in read_documents(file, settings["text_key"], settings["max_document_chars"], report):
                data = text.encode()
                digest = hashlib.sha256(data).digest()
                if not text.strip():
                    report.empty_documents += 1
                elif digest in seen:
                    report.duplicate_documents += 1
                else:
                    seen.add(digest)
                    content.update(digest)
                    split = split_of(digest, settings["fractions"])
                    splits[split]["documents"] += 1
                    splits[split]["text_bytes"] += len(data)
                    line = json.dumps({"source": file.name, "text": text}, ensure_ascii=False)
                    writers[split].write(line.encode() + b"\n")
            advance(file.path.stat().st_size)
    return {
        "splits": splits, "report": asdict(report),
        "content_hash": fingerprint([content.hexdigest(), settings["fractions"]]),
        "file_bytes": {_file_name(split): (output / _file_name(split)).stat().st_size for split in SPLITS},
    }


def _file_name(split: str) -> str:
    return f"{split}.jsonl.zst"
