"""Sources of pictures -> one prepared folder (prepared.py): rows checked, splits cut, mean and deviation measured, checksums taken.

Shape letters: n images, H height, W width, c channels.
"""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from megadsl.data.atomic_files import file_sha256, fingerprint, make_folder, read_json, sizes_match, write_json, written_atomically
from megadsl.data.progress_bar import progress
from megadsl.errors import UserError
from megadsl.tasks.image.prepared import FORMAT, MANIFEST, SPLITS
from megadsl.tasks.image.sources import Rows, Source, open_source

_SPLIT_SEED = 20240309  # any number: the same source is always cut alike
_CHUNK = 4096


@dataclass(frozen=True)
class Preparation:
    """How a source is read.

    Attributes:
        size: pictures of a folder are scaled and cut to size x size; None: they must be of one size.
        channels: pictures of a folder are made grey (1) or coloured (3); None: as the first one is.
        num_classes: None: those that are named, or the largest training label and one.
        validation_fraction, test_fraction: cut from the training images where the source has no such part.
        skip_bad_rows: count what cannot be used instead of stopping there.
    """

    size: int | None = None
    channels: int | None = None
    num_classes: int | None = None
    validation_fraction: float = 0.1
    test_fraction: float = 0.1
    skip_bad_rows: bool = False


@dataclass
class _Found:
    """What the first good image fixes for all, and what was left out."""

    shape: tuple[int, ...] | None = None
    skipped: list[str] = field(default_factory=list)


def prepare_images(path: Path, output: Path, wanted: Preparation) -> tuple[dict, bool]:
    """Write `output`, or find it made from the same files and whole -> (its images.json, whether it was used again).

    Raises:
        UserError: a source or a row that cannot be used, with its file and row.
    """
    if not 0.0 <= wanted.validation_fraction < 1.0 or not 0.0 <= wanted.test_fraction < 1.0 - wanted.validation_fraction:
        raise UserError(f"--validation-fraction {wanted.validation_fraction} and --test-fraction {wanted.test_fraction} must leave images to train on.")
    source = open_source(path, wanted.size, wanted.channels)
    made_from = fingerprint([str(path.resolve()), [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in source.files],
                             {**vars(wanted)}, source.classes, FORMAT])
    old = read_json(output / MANIFEST)
    if old is not None and old.get("made_from") == made_from and _whole(output, old):
        return old, True
    make_folder(output)
    (output / MANIFEST).unlink(missing_ok=True)  # while its files change, the folder is no prepared one
    classes, found, counts = _classes(source, wanted), _Found(), {}
    parts = _cut(source, wanted)
    for split in SPLITS:
        counts[split] = _write_split(output, split, parts.get(split, []), len(classes), found, wanted)
    if not counts["train"]:
        raise UserError(f"Not one training image of {path} can be used; the first mistake: {found.skipped[0]}")
    height, width, channels = found.shape
    mean, deviation = _moments(np.memmap(output / "train.images.bin", np.uint8, "r", shape=(counts["train"], *found.shape)))
    if min(deviation) <= 0.0:
        raise UserError(f"All training images of {path} have one and the same value in a channel; there is nothing to learn from.")
    names = [f"{split}.{kind}.bin" for split in SPLITS for kind in ("images", "labels")]
    manifest = {
        "format": FORMAT, "made_from": made_from, "source": str(path), "height": height, "width": width, "channels": channels,
        "classes": list(classes), "mean": mean, "deviation": deviation, "splits": counts, "skipped_rows": len(found.skipped),
        "first_skipped": found.skipped[:10], "file_bytes": {name: (output / name).stat().st_size for name in names},
        "sha256": {name: file_sha256(output / name) for name in names},
    }
    write_json(output / MANIFEST, manifest)
    return manifest, False


def _whole(folder: Path, manifest: dict) -> bool:
    """Whether every file has the size and the checksum that the manifest says."""
    sizes, sums = manifest.get("file_bytes"), manifest.get("sha256")
    if not isinstance(sizes, dict) or not isinstance(sums, dict) or not sizes_match(folder, sizes):
        return False
    return all(file_sha256(folder / name) == value for name, value in sums.items())


def _classes(source: Source, wanted: Preparation) -> tuple[str, ...]:
    if source.classes is not None:
        return source.classes
    rows = source.splits["train"]
    count = wanted.num_classes or 1 + max(rows.label(index) for index in range(len(rows)))
    return tuple(map(str, range(count)))


def _cut(source: Source, wanted: Preparation) -> dict[str, list[tuple[Rows, int]]]:
    """Rows by split; parts that the source has not are cut from the training images at random."""
    parts = {split: [(rows, index) for index in range(len(rows))] for split, rows in source.splits.items()}
    train = parts["train"]
    order = np.random.RandomState(_SPLIT_SEED).permutation(len(train))
    for split, share in (("validation", wanted.validation_fraction), ("test", wanted.test_fraction)):
        if split not in parts:
            taken, order = np.split(order, [round(share * len(train))])
            parts[split] = [train[index] for index in sorted(taken)]
    parts["train"] = [train[index] for index in sorted(order)]
    return parts


def _write_split(output: Path, split: str, rows: list[tuple[Rows, int]], classes: int, found: _Found, wanted: Preparation) -> int:
    """Write the images and labels of a split; how many there are."""
    labels = []
    with written_atomically(output / f"{split}.images.bin") as temporary, temporary.open("wb") as file, progress(split, len(rows)) as advance:
        for part, index in rows:
            try:
                image, label = _checked(part, index, classes, found, wanted)
            except UserError as error:
                if not wanted.skip_bad_rows:
                    raise UserError(f"{error} Mend or remove it, or leave such rows out with --skip-bad-rows.") from error
                found.skipped.append(str(error))
            else:
                file.write(np.ascontiguousarray(image).tobytes())
                labels.append(label)
            advance(1)
    with written_atomically(output / f"{split}.labels.bin") as temporary:
        temporary.write_bytes(np.array(labels, "<i4").tobytes())
    return len(labels)


def _checked(rows: Rows, index: int, classes: int, found: _Found, wanted: Preparation) -> tuple[np.ndarray, int]:
    """(image, label) of a row; UserError where it does not fit the others."""
    label = rows.label(index)
    if not 0 <= label < classes:
        raise UserError(f"{rows.where(index)}: label {label} is out of range, there are {classes} classes (0 to {classes - 1}).")
    image = rows.read(index)
    if wanted.channels is not None and image.shape[2] != wanted.channels or image.shape[2] not in (1, 3):
        raise UserError(f"{rows.where(index)}: {image.shape[2]} channels, {wanted.channels or '1 or 3'} are wanted.")
    if not min(image.shape):
        raise UserError(f"{rows.where(index)}: an image of {image.shape[0]} x {image.shape[1]} pixels.")
    found.shape = found.shape or image.shape
    if image.shape != found.shape:
        ours, theirs = ("{} x {} with {} channels".format(*shape) for shape in (image.shape, found.shape))
        raise UserError(f"{rows.where(index)}: {ours}, where the first image is {theirs}; --size and --channels make pictures of a folder alike.")
    return image, label


def _moments(images: np.ndarray) -> tuple[list[float], list[float]]:
    """(mean, deviation) of every channel, in units of 255."""
    total, squares = np.zeros(images.shape[3]), np.zeros(images.shape[3])
    for start in range(0, len(images), _CHUNK):
        # Sums of whole numbers are exact, so the order of adding up does not matter.
        chunk = images[start:start + _CHUNK].astype(np.uint64)
        total += chunk.sum(axis=(0, 1, 2))
        squares += np.square(chunk).sum(axis=(0, 1, 2))
    pixels = float(np.prod(images.shape[:3]))
    mean = total / pixels
    return (mean / 255.0).tolist(), (np.sqrt(np.maximum(squares / pixels - mean ** 2, 0.0)) / 255.0).tolist()
