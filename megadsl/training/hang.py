"""A run that cannot go on ends with a reason: a step that takes for ever (stacks of all ranks), or a rank that has gone."""

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

HUNG = 76
_MARK = "hung"
# What gloo and NCCL say when the other side is gone or silent.
_LOST_WORDS = ("closed by peer", "reset by peer", "broken pipe", "timed out", "timeout", "remote process exited", "socket", "ncclremoteerror")


class Watch:
    """Ends the process when one step takes longer than `minutes`. `with watch:` around each step; 0 minutes: never.

    The first rank to notice leaves a mark in RUN/stacks; the others see it and write down their stacks too, wherever they are.
    """

    def __init__(self, minutes: float, run_dir: Path, rank: int):
        self._seconds, self._folder, self._rank = minutes * 60, run_dir / "stacks", rank
        self._began: float | None = None
        self._started = time.time()
        self._interval = min(5.0, max(0.1, self._seconds / 20))
        if minutes:
            threading.Thread(target=self._watch, name="hang watch", daemon=True).start()

    def __enter__(self) -> None:
        self._began = time.monotonic()

    def __exit__(self, *exception) -> None:
        self._began = None

    def _watch(self) -> None:
        while True:
            time.sleep(self._interval)
            began = self._began
            late = time.monotonic() - began if began is not None else 0.0
            if late > self._seconds or self._marked():
                self._end(late)

    def _marked(self) -> bool:
        mark = self._folder / _MARK
        return mark.exists() and mark.stat().st_mtime > self._started

    def _end(self, seconds: float) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"rank-{self._rank}.txt"
        with path.open("w", encoding="utf-8") as file:
            faulthandler.dump_traceback(file, all_threads=True)
        (self._folder / _MARK).touch()
        print(
            f"megadsl: rank {self._rank}: no step for {seconds / 60:.1f} minutes (training.hang_minutes); its Python stack is in {path}; "
            "the run ends, submit it again to go on from its last checkpoint",
            file=sys.stderr, flush=True,
        )
        # The others look for the mark in this time; when the first rank is gone a launcher may kill them.
        time.sleep(3 * self._interval)
        os._exit(HUNG)


@contextmanager
def lost_ranks_are_a_sentence(rank: int) -> Iterator[None]:
    """Where another rank has gone, say so and exit with code 1; each rank says it, since the first may be the one that died."""
    try:
        yield
    except RuntimeError as error:
        if not any(word in str(error).lower() for word in _LOST_WORDS):
            raise
        reason = str(error).strip().splitlines()[0]
        print(
            f"megadsl: rank {rank} has lost another rank ({reason}): a process or node has died, or a collective took longer than "
            "parallel.timeout_minutes. The run ends; submit it again to go on from its last checkpoint.",
            file=sys.stderr, flush=True,
        )
        # Not sys.exit: leaving the process groups in order would wait for the rank that is gone.
        os._exit(1)
