"""A TSV manifest of utterances -> a dataset folder: features computed once, on several processes, and memory-mapped from then on.

Columns id, audio, n_frames, tgt_text are fairseq's; n_frames is counted anew. audio is a path, relative to the manifest. What a
folder holds beside what target_text/stored.py says: features.bin, all frames of 80 numbers in fp16 behind each other in the order
of the rows, and utterances.npz, by split the first frame and the number of frames of every utterance.
"""

import os
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from megadsl.data.atomic_files import written_atomically
from megadsl.data.progress_bar import progress
from megadsl.data.worker_pool import ordered_map
from megadsl.errors import UserError
from megadsl.tasks.speech.features import NUM_BINS, UnusableAudio, require_packages, utterance_features
from megadsl.tasks.target_text.rows import SPLITS, BadRows, Row, read_rows, split_of
from megadsl.tasks.target_text.stored import (
    StoredTexts, TextExamples, begin_dataset, earlier_dataset, finish_dataset, write_arrays, write_targets,
)

NAME, MAKER = "speech", "megadsl data speech"
FEATURES, UTTERANCES = "features.bin", "utterances.npz"
# fairseq's; n_frames may be missing, since it is counted anew.
_REQUIRED = ("id", "audio", "tgt_text")
_OPTIONAL = ("n_frames", "split", "src_text", "speaker", "src_lang", "tgt_lang")
_CHUNK = 16  # utterances that a worker takes at a time


@dataclass(frozen=True)
class SpeechSettings:
    """What a dataset of speech depends on beside the rows."""

    target_column: str = "tgt_text"
    vocab_size: int = 1000
    model_type: str = "unigram"
    min_frames: int = 5
    max_frames: int = 3000
    fractions: tuple[float, float, float] = (0.9, 0.05, 0.05)
    limit: int | None = None


def prepare_speech(manifest: Path, output: Path, settings: SpeechSettings, tokenizer: Path | None = None, workers: int | None = None,
                   skip_bad_rows: bool = False) -> tuple[dict, bool]:
    """Write the dataset folder `output`; its manifest, and whether an earlier, equal one was used again.

    Raises:
        UserError: a row that cannot be used (unless `skip_bad_rows`), no row that can, or no package that reads audio.
    """
    require_packages()
    bad = BadRows(skip_bad_rows)
    rows = list(_rows(manifest, settings, bad))[:settings.limit]
    inputs = [vars(settings), skip_bad_rows, None if tokenizer is None else tokenizer.read_bytes().hex(), [_identity(row, manifest) for row in rows]]
    if earlier := earlier_dataset(output, NAME, inputs):
        return earlier, True
    begin_dataset(output, NAME)
    examples, lengths = _write_features(rows, manifest, output, settings, workers or len(os.sched_getaffinity(0)), bad)
    if not len(examples):
        raise UserError(f"{manifest} has no row that can be used.")
    loaded = write_targets(output, examples, tokenizer, settings.vocab_size, settings.model_type)
    arrays, splits, first = {}, {}, np.cumsum(lengths) - lengths
    for split in SPLITS:
        members = examples.of(split)
        arrays |= {f"{split}_first": first[members], f"{split}_frames": lengths[members]}
        splits[split] = {"examples": len(members), "frames": int(lengths[members].sum())}
    write_arrays(output / UTTERANCES, arrays)
    return finish_dataset(output, NAME, inputs, {
        "source": str(manifest), "target_column": settings.target_column, "num_bins": NUM_BINS, "splits": splits,
        "tokenizer_sha256": loaded.sha256, "vocab_size": loaded.vocab_size, "skipped_rows": dict(bad.reasons),
    }, [FEATURES, UTTERANCES]), False


def _rows(manifest: Path, settings: SpeechSettings, bad: BadRows):
    """Rows that can be used as far as the manifest says."""
    required = (*_REQUIRED, settings.target_column) if settings.target_column not in _REQUIRED else _REQUIRED
    seen: set[str] = set()
    for row in read_rows(manifest, required, _OPTIONAL, bad):
        text, example = row.values[settings.target_column], row.values["id"]
        if not example or example in seen:
            bad.add(row.where, "has no id of its own", example)
        elif not text:
            bad.add(row.where, f"has an empty {settings.target_column}")
        elif split_of(row, text, settings.fractions) is None:
            bad.add(row.where, "names an unknown split", f"{row.values['split']}; known are {', '.join(SPLITS)}")
        else:
            seen.add(example)
            yield row


def _identity(row: Row, manifest: Path) -> list:
    """What tells a row from a changed one; of a file its size and time, since reading all would take as long as the work."""
    path = manifest.parent / row.values["audio"]
    stat = path.stat() if path.is_file() else None
    return [row.values, stat and [stat.st_size, stat.st_mtime_ns]]


def _write_features(rows: list[Row], manifest: Path, output: Path, settings: SpeechSettings, workers: int,
                    bad: BadRows) -> tuple[TextExamples, np.ndarray]:
    """features.bin; the examples that have features and their numbers of frames."""
    examples, lengths = TextExamples(), []
    chunks = [rows[start:start + _CHUNK] for start in range(0, len(rows), _CHUNK)]
    with ExitStack() as stack:
        run = stack.enter_context(ordered_map(workers))
        advance = stack.enter_context(progress(f"features of {len(rows)} utterances", len(rows)))
        file = stack.enter_context(stack.enter_context(written_atomically(output / FEATURES)).open("wb"))
        work = partial(_features, manifest.parent, settings.min_frames, settings.max_frames)
        for chunk, found in zip(chunks, run(work, chunks), strict=True):
            for row, features in zip(chunk, found, strict=True):
                if isinstance(features, tuple):
                    bad.add(row.where, *features)
                    continue
                file.write(features.tobytes())
                text = row.values[settings.target_column]
                examples.add(row.values["id"], split_of(row, text, settings.fractions), text, row.where)
                lengths.append(len(features))
            advance(len(chunk))
    return examples, np.array(lengths, np.int64)


def _features(folder: Path, min_frames: int, max_frames: int, rows: list[Row]) -> list[np.ndarray | tuple[str, str]]:
    """Of every row its features [n, 80] fp16, or (reason, detail) why there are none."""
    found = []
    for row in rows:
        try:
            found.append(utterance_features(folder / row.values["audio"], min_frames, max_frames))
        except UnusableAudio as error:
            found.append((error.reason, error.detail))
    return found


class StoredSpeech(StoredTexts):
    """A dataset of speech as it is read."""

    def __init__(self, folder: Path):
        super().__init__(folder, NAME, MAKER)
        with np.load(folder / UTTERANCES) as file:
            self._utterances = dict(file)
        self._features = None

    def source_lengths(self, split: str) -> np.ndarray:
        """Frames of every utterance of a split."""
        return self._utterances[f"{split}_frames"]

    def features(self, split: str, index: int) -> np.ndarray:
        """[n, 80] fp16, a view of the mapped file."""
        if self._features is None:  # once per process: readers are forked
            self._features = np.memmap(self.folder / FEATURES, np.float16, "r").reshape(-1, NUM_BINS)
        first, length = (int(self._utterances[f"{split}_{name}"][index]) for name in ("first", "frames"))
        return self._features[first:first + length]
