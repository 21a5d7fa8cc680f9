"""Does a folder's file system keep what checkpoints rely on? Seen by all ranks, whole files after a rename, one winner of a lock.

Network file systems differ from a disk in just these points. Every check runs between the ranks (between threads, for one).
"""

import fcntl
import os
import shutil
import threading
import time
from pathlib import Path

from megadsl.errors import UserError
from megadsl.parallel.checks.findings import Finding, Ranks

_SPEED_BYTES = 32 * 2**20
_RENAME_SECONDS = 0.7
_RENAMED_BYTES = 2**16
_SEEN_SECONDS = 5


def check_file_system(folder: Path, ranks: Ranks) -> list[Finding]:
    """Findings about `folder`, where checkpoints will be written; equal on all ranks.

    Raises:
        UserError: the folder cannot be written.
    """
    work = folder / f".megadsl-doctor-{ranks.gather(os.getpid())[0]}"
    refused = None
    if ranks.rank == 0:
        try:
            work.mkdir(parents=True)
        except OSError as error:
            refused = error.strerror
    refused = ranks.gather(refused)[0]
    if refused:
        raise UserError(f"--folder {folder} cannot be written ({refused}); name one where your runs will lie.")
    try:
        shared = _is_shared(work, ranks)
        found = [Finding("folder", f"{folder.resolve()}, {shutil.disk_usage(folder).free / 1e9:,.0f} GB free on {_mount(folder)}", shared)]
        if not shared:
            found += [_speed(work, ranks), _rename(work, ranks), _exclusive(work, ranks), _locks(work, ranks)]
        return found
    finally:
        ranks.barrier()
        if ranks.rank == 0:
            shutil.rmtree(work, ignore_errors=True)


def _is_shared(work: Path, ranks: Ranks) -> str:
    if ranks.rank == 0:
        (work / "token").write_text("seen", encoding="utf-8")
    ranks.barrier()
    deadline = time.monotonic() + _SEEN_SECONDS
    while not (seen := (work / "token").exists()) and time.monotonic() < deadline:
        time.sleep(0.2)
    blind = [rank for rank, saw in enumerate(ranks.gather(seen)) if not saw]
    if blind:
        return f"rank(s) {blind} do not see what rank 0 wrote: this folder is not shared; put training.run_dir on one that all nodes mount."
    return ""


def _speed(work: Path, ranks: Ranks) -> Finding:
    """Rank 0 alone, as it is when a checkpoint of one rank is written."""
    text = ""
    if ranks.rank == 0:
        block, path = os.urandom(2**20), work / "speed"
        begun = time.perf_counter()
        with path.open("wb") as file:
            for _ in range(_SPEED_BYTES // len(block)):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
        written = time.perf_counter() - begun
        begun = time.perf_counter()
        with (work / "small").open("wb") as file:
            file.write(b"x")
            file.flush()
            os.fsync(file.fileno())
        os.replace(work / "small", work / "renamed")
        small = time.perf_counter() - begun
        text = f"{_SPEED_BYTES / 1e6 / written:,.0f} MB/s written and synced; a small file, synced and renamed, in {small * 1e3:.1f} ms"
    return Finding("file system speed", ranks.gather(text)[0])


def _rename(work: Path, ranks: Ranks) -> Finding:
    """Rank 0 replaces a file over and over; whoever reads it must always find one of the versions, whole."""
    path = work / "renamed-over"
    if ranks.rank == 0:
        path.write_bytes(bytes(_RENAMED_BYTES))
    ranks.barrier()
    end, reads, broken = time.monotonic() + _RENAME_SECONDS, [], []

    def read() -> None:
        while time.monotonic() < end:
            try:
                content = path.read_bytes()
                whole = len(content) == _RENAMED_BYTES and content == content[:1] * _RENAMED_BYTES
                reads.append(whole)
            except OSError as error:
                broken.append(error.strerror)

    if ranks.rank == 0:
        reader = threading.Thread(target=read)
        reader.start()
        version = 0
        while time.monotonic() < end:
            version = (version + 1) % 256
            path.with_suffix(".new").write_bytes(bytes([version]) * _RENAMED_BYTES)
            os.replace(path.with_suffix(".new"), path)
        reader.join()
    else:
        read()
    count, torn = (sum(ranks.gather(value)) for value in (len(reads), reads.count(False)))
    missing = sorted({error for errors in ranks.gather(broken) for error in errors})
    problem = ""
    if torn or missing:
        problem = (
            f"a file that is being replaced is not always whole there ({torn} torn of {count} reads{''.join(', ' + e for e in missing)}): "
            "checkpoints rely on it; keep training.run_dir on another file system."
        )
    return Finding("rename", f"atomic in {count:,} reads" if not problem else "not atomic", problem)


def _exclusive(work: Path, ranks: Ranks) -> Finding:
    """All ranks create the same file with O_EXCL at once: exactly one may win."""
    winners = []
    for attempt in range(5):
        ranks.barrier()
        try:
            os.close(os.open(work / f"exclusive-{attempt}", os.O_CREAT | os.O_EXCL | os.O_WRONLY))
            won = True
        except FileExistsError:
            won = False
        winners.append(sum(ranks.gather(won)))
    problem = "" if winners == [1] * 5 else f"{max(winners)} ranks created the same file with O_EXCL: two runs could share a folder; use another."
    return Finding("exclusive creation", "one winner in 5 races" if not problem else "broken", problem)


def _locks(work: Path, ranks: Ranks) -> Finding:
    """flock held by rank 0 must be refused to the others (to a second descriptor, for one process)."""
    path = work / "lock"
    with path.open("w") as mine:
        if ranks.rank == 0:
            fcntl.flock(mine, fcntl.LOCK_EX)
        ranks.barrier()
        refused = True
        with path.open("w") as other:
            if ranks.rank or ranks.size == 1:
                try:
                    fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    refused = False
                except OSError:
                    refused = True
            lost = [rank for rank, held in enumerate(ranks.gather(refused)) if not held]
    text = "flock holds between all ranks" if not lost else f"flock does not hold towards rank(s) {lost}; nothing in megadsl relies on it alone"
    return Finding("locks", text)


def _mount(folder: Path) -> str:
    """type and mount point, from the kernel's table."""
    path, best = str(folder.resolve()), ("/", "?")
    for line in Path("/proc/mounts").read_text(encoding="utf-8").splitlines():
        _, point, kind, *_ = line.split()
        if (path + "/").startswith(point.rstrip("/") + "/") and len(point) >= len(best[0]):
            best = (point, kind)
    return f"{best[1]} ({best[0]})"
