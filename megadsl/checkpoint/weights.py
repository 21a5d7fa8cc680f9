"""Full tensors by canonical name in safetensors files of bounded size: written with their checksum, read memory-mapped.

safetensors is a JSON header and raw numbers: reading it cannot run code.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from megadsl.checkpoint.manifest import DamagedCheckpoint, FileRecord, Manifest, check_sizes, read_manifest
from megadsl.errors import UserError

KINDS = ("weights", "exp_avg", "exp_avg_sq")  # folders of a checkpoint: fp32 master weights and Adam's two moments
FILE_BYTES = 1 << 30  # also what a writer holds in memory


def write_tensors(
    folder: Path, part: str, tensors: Iterable[tuple[str, str, torch.Tensor]], file_bytes: int = FILE_BYTES,
) -> tuple[dict[str, FileRecord], OSError | None]:
    """Write (kind, name, fp32 tensor on the host) to folder/KIND/`part`-NNN.safetensors, each file fsynced.

    Consumes `tensors` to the end even after an error, because other ranks take part in making them; the error is returned.
    """
    records, pending, size, error = {}, {}, 0, None

    def flush(kind: str) -> OSError | None:
        path = f"{kind}/{part}-{sum(name.startswith(kind + '/') for name in records):03d}.safetensors"
        try:
            records[path] = _write_file(folder / path, pending)
        except OSError as problem:
            return problem
        return None

    current = None
    for kind, name, tensor in tensors:
        if error is not None:
            continue
        if pending and (kind != current or size + tensor.numel() * 4 > file_bytes):
            error = flush(current)
            pending, size = {}, 0
        current, size = kind, size + tensor.numel() * 4
        pending[name] = tensor
    if pending and error is None:
        error = flush(current)
    return records, error


def _write_file(path: Path, tensors: dict[str, torch.Tensor]) -> FileRecord:
    header, offset = {}, 0
    for name, tensor in tensors.items():
        if tensor.dtype != torch.float32:
            raise TypeError(f"{name} is {tensor.dtype}; checkpoints hold fp32")
        end = offset + tensor.numel() * 4
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the format wants tensors aligned to 8 bytes
    digest, size = hashlib.sha256(), 0
    path.parent.mkdir(exist_ok=True)
    with open(path, "wb") as file:
        for data in (len(text).to_bytes(8, "little"), text, *(t.contiguous().view(-1).numpy().data for t in tensors.values())):
            file.write(data)
            digest.update(data)
            size += memoryview(data).nbytes
        file.flush()
        os.fsync(file.fileno())
    return FileRecord(size, digest.hexdigest(), tuple(tensors))


class TensorReader:
    """Tensors of a checkpoint, read one by one; nothing but what is asked for gets into memory. A context manager.

    Attributes:
        bytes_read: of the tensors that were asked for.
    """

    def __init__(self, folder: Path, manifest: Manifest):
        self.folder = folder
        self._files = {kind: manifest.tensor_files(kind) for kind in KINDS}
        self._open: dict[str, safe_open] = {}
        self._stack = ExitStack()
        self.bytes_read = 0

    def __enter__(self) -> "TensorReader":
        return self

    def __exit__(self, *exception) -> None:
        self._stack.close()
        self._open.clear()

    def names(self, kind: str) -> list[str]:
        return list(self._files[kind])

    def shape(self, kind: str, name: str) -> tuple[int, ...]:
        return tuple(self._slice(kind, name).get_shape())

    def tensor(self, kind: str, name: str) -> torch.Tensor:
        """The full tensor."""
        return self.part(kind, name, ())

    def part(self, kind: str, name: str, index: tuple[slice, ...]) -> torch.Tensor:
        """full[index]; of its first dimension nothing else is read (of the others, nothing beyond pages of memory)."""
        try:
            tensor = self._slice(kind, name)[index if index else ...]
        except (OSError, SafetensorError) as error:
            raise UserError(f"{self.folder / self._files[kind][name]} cannot be read ({error}); use another checkpoint.") from error
        self.bytes_read += tensor.numel() * tensor.element_size()
        return tensor

    def _slice(self, kind: str, name: str):
        if name not in self._files[kind]:
            raise UserError(f"{self.folder} has no tensor {name} in {kind}; the checkpoint is not of this model.")
        path = self._files[kind][name]
        try:
            if path not in self._open:
                self._open[path] = self._stack.enter_context(safe_open(self.folder / path, framework="pt"))
            return self._open[path].get_slice(name)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{self.folder / path} cannot be read ({error}); use another checkpoint.") from error


def read_weights(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """(canonical name, full fp32 tensor) of every parameter of a checkpoint, one after the other."""
    try:
        manifest = read_manifest(folder)
        check_sizes(folder, manifest)
    except DamagedCheckpoint as error:
        raise UserError(f"{folder} is damaged: {error}; use another checkpoint.") from error
    with TensorReader(folder, manifest) as reader:
        for name in reader.names("weights"):
            yield name, reader.tensor("weights", name)
