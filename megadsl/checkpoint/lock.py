"""One run in a folder at a time: RUN/checkpoints/.lock names its holder and is touched every few seconds.

Not fcntl: on shared file systems it is often local or absent. Creating a file exclusively is atomic everywhere. A lock is taken
over when its holder cannot live any more: same host and no such process, an earlier start of the same SLURM job, or no
sign of life for a minute by the file system's own clock.
"""

import json
import os
import socket
import threading
import uuid
from pathlib import Path

from megadsl.errors import UserError

HEARTBEAT_SECONDS, STALE_SECONDS = 5.0, 60.0


class RunLock:
    """Taken when made (by one rank); `release` when done. `note` says whose lock was taken over, if anybody's.

    Raises:
        UserError: another run holds it.
    """

    def __init__(self, folder: Path):
        self.path = folder / ".lock"
        self.note: str | None = None
        folder.mkdir(parents=True, exist_ok=True)
        self._text = json.dumps(_myself())
        while not self._create():
            self._take_over()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True, name="run-lock")
        self._thread.start()

    def release(self) -> None:
        self._stop.set()
        self._thread.join()
        if _read(self.path) == self._text:
            self.path.unlink(missing_ok=True)

    def _create(self) -> bool:
        # Written aside and linked, so that nobody reads half a lock.
        aside = self.path.with_name(f".lock.{uuid.uuid4().hex}")
        try:
            aside.write_text(self._text, encoding="utf-8")
            os.link(aside, self.path)
            return True
        except FileExistsError:
            return False
        finally:
            aside.unlink(missing_ok=True)

    def _take_over(self) -> None:
        text = _read(self.path)
        if text is None:
            return  # released in the meantime
        reason = self._reason_to_take(text)
        holder = _describe(text)
        if reason is None:
            raise UserError(
                f"{self.path.parent} is in use by {holder}; wait for its end, stop it, or choose another training.run_dir "
                f"(a run that died is noticed after {STALE_SECONDS:.0f} s)."
            )
        aside = self.path.with_name(f".lock.{uuid.uuid4().hex}")
        try:
            self.path.rename(aside)
        except FileNotFoundError:
            return
        if _read(aside) != text:  # somebody was quicker: it is theirs
            aside.rename(self.path)
            return
        aside.unlink(missing_ok=True)
        self.note = f"took over the lock of {holder}, {reason}"

    def _reason_to_take(self, text: str) -> str | None:
        try:
            holder, mine = json.loads(text), json.loads(self._text)
            if holder["host"] == mine["host"] and _started(holder["pid"]) != holder["started"]:
                return "which is no longer running"
            if holder["job"] is not None and holder["job"] == mine["job"] and holder["restart"] != mine["restart"]:
                return "an earlier start of this job"
        except (ValueError, KeyError, TypeError):
            return "which is not readable"
        probe = self.path.with_name(f".lock.{uuid.uuid4().hex}")
        probe.touch()
        age = probe.stat().st_mtime - self.path.stat().st_mtime
        probe.unlink()
        return f"which has given no sign of life for {age:.0f} s" if age > STALE_SECONDS else None

    def _beat(self) -> None:
        while not self._stop.wait(HEARTBEAT_SECONDS):
            try:
                os.utime(self.path)
            except OSError:
                continue  # a file system that is away for a moment; the next beat may arrive


def _myself() -> dict:
    pid = os.getpid()
    return {
        "host": socket.gethostname(), "pid": pid, "started": _started(pid), "job": os.environ.get("SLURM_JOB_ID"),
        "restart": os.environ.get("SLURM_RESTART_COUNT", "0"),
    }


def _started(pid: int) -> str | None:
    """When a process of this host was started (clock ticks since boot); None: there is none, or it is dead."""
    try:
        fields = Path(f"/proc/{int(pid)}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None


def _describe(text: str) -> str:
    try:
        holder = json.loads(text)
        job = f", SLURM job {holder['job']}" if holder["job"] else ""
        return f"process {holder['pid']} on {holder['host']}{job}"
    except (ValueError, KeyError, TypeError):
        return "an unknown process"
