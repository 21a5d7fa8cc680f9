"""Index arrays of a dataset, built once, kept beside it and mapped by every process: DATASET/index/NAME-KEY/*.npy.

Megatron's own cache (path_to_cache) needs a barrier, is not atomic, is found again after the dataset has changed, and is read
with pickle allowed. Here the key holds all that the arrays depend on, a folder appears by rename when it is complete, and who
builds is settled by a lock of the kernel, which dies with its process: no collective, so any rank may ask at any time.
"""

import fcntl
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import megadsl.parallel.device  # noqa: F401  isort: skip  (before Megatron-core)

import numpy as np
from megatron.core.utils import log_single_rank

from megadsl.data.atomic_files import fingerprint
from megadsl.data.dataset import INDEX

_WAIT_SECONDS = 1800.0  # for another process that builds; then this one builds for itself, in memory
_POLL_SECONDS = 0.2
_FORMAT = 1
_log = logging.getLogger(__name__)

Arrays = tuple[np.ndarray, ...]


def cached_arrays(dataset: Path, name: str, key: dict, parts: tuple[str, ...], build: Callable[[], Arrays]) -> Arrays:
    """What `build` returns, mapped from the cache; built by one process if it is not there.

    The cache lies in the dataset's folder, or under MEGADSL_CACHE (default: ~/.cache/megadsl) where that cannot be written. Where
    neither can, the arrays are built in memory, and a line says so.

    Args:
        dataset: folder of the dataset.
        name: what the arrays are of, for the reader of a listing.
        key: all that they depend on, as JSON values.
        parts: names of the arrays.
        build: makes them, none of them empty, the same for the same key.
    """
    entry = f"{name}-{fingerprint([_FORMAT, key])[:32]}"
    folders = [dataset / INDEX, _cache_home() / INDEX]
    for folder in folders:
        if (arrays := _mapped(folder / entry, parts)) is not None:
            return arrays
    problems = []
    for folder in folders:
        try:
            return _built_once(folder, entry, parts, build)
        except OSError as error:
            problems.append(f"{folder}: {error.strerror or error}")
    log_single_rank(
        _log, logging.WARNING, f"the sample index is built in memory by every process, at every start ({'; '.join(problems)}); "
        "set MEGADSL_CACHE to a folder that can be written",
    )
    return build()


def _cache_home() -> Path:
    return Path(os.environ.get("MEGADSL_CACHE") or os.path.expanduser("~/.cache/megadsl"))


def _built_once(folder: Path, entry: str, parts: tuple[str, ...], build: Callable[[], Arrays]) -> Arrays:
    """OSError where the folder cannot be written."""
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder / f".{entry}.lock"):
        if (arrays := _mapped(folder / entry, parts)) is None:  # nobody built it while this process waited
            shutil.rmtree(folder / entry, ignore_errors=True)
            _write(folder / entry, dict(zip(parts, build(), strict=True)))
            arrays = _mapped(folder / entry, parts)
    if arrays is None:
        raise OSError(f"{entry} cannot be read back")
    return arrays


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock of `path`; TimeoutError (an OSError) after half an hour. Without locks on the file system every process that
    finds no index builds it, which costs time and nothing else: the first complete one stays."""
    with open(path, "w", encoding="utf-8") as file:
        deadline = time.monotonic() + _WAIT_SECONDS
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() > deadline:
                    raise TimeoutError(None, f"{path} is locked by a process that builds") from error
                time.sleep(_POLL_SECONDS)
            except OSError as error:
                log_single_rank(_log, logging.DEBUG, f"{path} cannot be locked ({error.strerror})")
                break
        yield


def _write(final: Path, arrays: dict[str, np.ndarray]) -> None:
    """The arrays under a temporary name, on disk, then the rename. An old temporary folder is what a kill left."""
    for left in final.parent.glob(f".{final.name}.*.tmp"):
        if time.time() - left.stat().st_mtime > _WAIT_SECONDS:
            shutil.rmtree(left, ignore_errors=True)
    temporary = final.with_name(f".{final.name}.{os.uname().nodename}-{os.getpid()}.tmp")
    try:
        temporary.mkdir()
        for name, array in arrays.items():
            with open(temporary / f"{name}.npy", "wb") as file:
                np.lib.format.write_array(file, np.ascontiguousarray(array), allow_pickle=False)
                file.flush()
                os.fsync(file.fileno())
        try:
            temporary.rename(final)
        except OSError:
            if not final.is_dir():  # else another process, on a file system without locks, was first
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _mapped(folder: Path, parts: tuple[str, ...]) -> Arrays | None:
    """The arrays of a complete folder; None where there is none or a file is missing or cut short."""
    try:
        return tuple(np.load(folder / f"{part}.npy", mmap_mode="r", allow_pickle=False).view(np.ndarray) for part in parts)
    except (OSError, ValueError, EOFError):
        return None
