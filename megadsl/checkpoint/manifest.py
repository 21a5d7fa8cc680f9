"""manifest.json: what a checkpoint holds and by which checksums it is known. Written last; what has none does not exist.

    {"format": 1, "info": {...}, "files": {"weights/x.safetensors": {"bytes": n, "sha256": "...", "tensors": [names]}}, "sha256": "..."}

The last field is the checksum of the others, so that a manifest cut short or edited is not one. (SHA-256 and not a quicker
sum: 1,060 MiB/s here against 570 of blake2b, since processors have instructions for it.) No torch.
"""

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path, PurePosixPath

from megadsl.data.atomic_files import fingerprint

MANIFEST = "manifest.json"
FORMAT = 1
LIBRARIES = ("megadsl", "torch", "deepspeed", "megatron-core", "sentencepiece", "numpy", "safetensors")
_CHUNK = 1 << 22


class DamagedCheckpoint(Exception):
    """A checkpoint that cannot be used; the text says what is wrong with it."""


@dataclass(frozen=True)
class CheckpointInfo:
    """Where a run stood. `iteration` is the number of iterations done; the next one has this index.

    Attributes:
        padded_vocab_size: rows of the output matrix (of a vocabulary padded, or the number of classes).
        tokenizer_sha256: None where the task has no tokenizer.
        optimizer_steps: counts Adam's updates (for its bias correction); None: the checkpoint has no optimizer state.
        task: task.name.
        data_fingerprints: what identifies the data that the run reads (Task.data_fingerprints); None: not known (an import, or a
            checkpoint of an older version).
        first_loss: of the run's first finite iteration.
        rollbacks: [iteration, from, to] of every time that the run went back to `iteration` and left out the samples [from, to).
        alarms: what the alarms of every step remember (monitor/alarms.py).
    """

    iteration: int
    consumed_samples: int
    skipped_iterations: int
    loss: float | None
    tensor: int
    pipeline: int
    data: int
    zero_stage: int
    padded_vocab_size: int
    tokenizer_sha256: str | None
    versions: dict[str, str]
    optimizer_steps: int | None = None
    loss_scaler: dict[str, float] = field(default_factory=dict)
    task: str | None = None
    data_fingerprints: dict[str, str] | None = None
    first_loss: float | None = None
    rollbacks: list[list[int]] = field(default_factory=list)
    alarms: dict = field(default_factory=dict)


@dataclass(frozen=True)
class FileRecord:
    """One file of a checkpoint; `tensors` are the names in a safetensors file."""

    bytes: int
    sha256: str
    tensors: tuple[str, ...] = ()


@dataclass(frozen=True)
class Manifest:
    """The content of manifest.json; `files` by path relative to the checkpoint."""

    info: CheckpointInfo
    files: dict[str, FileRecord]

    def tensor_files(self, kind: str) -> dict[str, str]:
        """{canonical name: file} of a kind of tensor: weights, exp_avg or exp_avg_sq."""
        return {name: file for file, record in self.files.items() if file.startswith(f"{kind}/") for name in record.tensors}


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write and fsync it; the caller makes the folder visible."""
    values = {"format": FORMAT, "info": asdict(manifest.info), "files": {name: asdict(r) for name, r in manifest.files.items()}}
    text = json.dumps({**values, "sha256": fingerprint(values)}, indent=1)
    with open(folder / MANIFEST, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def read_manifest(folder: Path) -> Manifest:
    """Raises DamagedCheckpoint where there is none or it is not intact."""
    path = folder / MANIFEST
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DamagedCheckpoint(f"{MANIFEST} cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise DamagedCheckpoint(f"{MANIFEST} is not JSON") from error
    if not isinstance(values, dict) or values.pop("sha256", None) != fingerprint(values):
        raise DamagedCheckpoint(f"{MANIFEST} does not fit its own checksum")
    if values.get("format") != FORMAT:
        raise DamagedCheckpoint(f"{MANIFEST} has format {values.get('format')}, this version reads {FORMAT}")
    try:
        files = {name: FileRecord(r["bytes"], r["sha256"], tuple(r["tensors"])) for name, r in values["files"].items()}
        manifest = Manifest(CheckpointInfo(**values["info"]), files)
    except (AttributeError, KeyError, TypeError) as error:
        raise DamagedCheckpoint(f"{MANIFEST} has not the fields of a manifest ({error})") from error
    if any(PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts for name in files):
        raise DamagedCheckpoint(f"{MANIFEST} names files outside of the checkpoint")
    return manifest


def check_sizes(folder: Path, manifest: Manifest) -> None:
    """DamagedCheckpoint naming the first file that is missing or of another size."""
    for name, record in manifest.files.items():
        try:
            size = (folder / name).stat().st_size
        except OSError as error:
            raise DamagedCheckpoint(f"{name} is missing") from error
        if size != record.bytes:
            raise DamagedCheckpoint(f"{name} has {size} bytes instead of {record.bytes}")


def damaged_files(folder: Path, manifest: Manifest, names: Iterable[str] | None = None) -> dict[str, str]:
    """{file: what is wrong with it} among `names` (default: all), by checksum."""
    found = {}
    for name in manifest.files if names is None else names:
        try:
            if record_of(folder / name).sha256 != manifest.files[name].sha256:
                found[name] = f"{name} does not fit its checksum"
        except OSError as error:
            found[name] = f"{name} cannot be read ({error.strerror})"
    return found


def record_of(path: Path) -> FileRecord:
    """Size and checksum of a file on disk."""
    digest, size = hashlib.sha256(), 0
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            size += len(chunk)
    return FileRecord(size, digest.hexdigest())


def library_versions() -> dict[str, str]:
    """Versions of the libraries that decide what a checkpoint means."""
    return {name: version(name) for name in LIBRARIES}
