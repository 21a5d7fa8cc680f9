"""A run that cannot go on ends with a reason: a phase without progress (stacks of all ranks), or a rank that has gone.

A training step has to end within training.hang_minutes. Validation and saving may take longer, as long as some rank gets on with
them: ranks tell each other by a file, since the first ones to finish wait in a collective for the slowest.
"""

import faulthandler
import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path

import torch.distributed as dist

HUNG = 76
_MARK = "hung"
# What NCCL, gloo and the store say when the other side is gone or silent; all of them have other errors too.
_LOST_WORDS = ("closed by peer", "reset by peer", "broken pipe", "timed out", "timeout", "remote process exited", "socket", "ncclremoteerror")
_GLOO = re.compile(r"\[\S*/gloo/\S+\]|Application timeout caused pair closure")


class Phase(StrEnum):
    """What a rank is at, in the words of the sentence that ends a hung run."""

    STEP = "a step"
    VALIDATION = "validation"
    SAVING = "saving"


class Watch:
    """Ends the process when a phase makes no progress for `minutes`; 0: never.

        with watch.during(Phase.VALIDATION):
            engine.evaluate(watch.following(batches, Phase.VALIDATION), ...)

    The first rank to notice leaves a mark in RUN/stacks; the others see it and write down their stacks too, wherever they are.
    Files are looked after in a thread of their own: where the run folder's file system is what hangs, the run ends all the same.
    """

    def __init__(self, minutes: float, run_dir: Path, rank: int):
        self._seconds, self._folder, self._rank = minutes * 60, run_dir / "stacks", rank
        self._phase: Phase | None = None
        self._moved = self._told = 0.0  # when the phase last moved on, on any rank; when this rank last told the others
        self._own = False  # whether this rank has moved on since it told them
        self._seen: dict[Phase, int] = {}
        self._started = time.time()
        self._interval = min(5.0, max(0.1, self._seconds / 20))
        self._marked = False
        if minutes:
            for work in (self._watch, self._exchange):
                threading.Thread(target=work, name="hang watch", daemon=True).start()

    @contextmanager
    def during(self, phase: Phase) -> Iterator[None]:
        """Watch what happens inside; a phase around this one starts its time anew afterwards."""
        outer = self._phase
        self._begin(phase)
        try:
            yield
        finally:
            self._begin(outer)

    def _begin(self, phase: Phase | None) -> None:
        self._moved = self._told = time.monotonic()
        self._phase, self._own = phase, False

    def beat(self, phase: Phase) -> None:
        """`phase` has moved on, by any thread; nothing where this rank is at something else."""
        if self._phase is phase:
            self._moved, self._own = time.monotonic(), True

    def following(self, items: Iterable, phase: Phase) -> Iterator:
        """`items`, with a beat for each that is taken."""
        for item in items:
            self.beat(phase)
            yield item

    def _watch(self) -> None:
        while True:
            time.sleep(self._interval)
            phase, late = self._phase, time.monotonic() - self._moved
            if phase is not None and late > self._seconds:
                self._end(f"no progress in {phase} for {late / 60:.1f} minutes (training.hang_minutes)")
            if self._marked:
                self._end(f"another rank hangs, and this one is in {phase or 'no phase that is watched'}")

    def _exchange(self) -> None:
        """Tell the others and hear from them, by files in RUN/stacks. A phase that is soon over leaves none."""
        while True:
            time.sleep(self._interval)
            phase = self._phase
            try:
                self._marked = self._modified(_MARK) > self._started * 1e9
                if phase is None:
                    continue
                if self._own and time.monotonic() - self._told > self._seconds / 4:
                    self._folder.mkdir(parents=True, exist_ok=True)
                    (self._folder / phase.name.lower()).touch()
                    self._told, self._own = time.monotonic(), False
                # Compared with what was seen before, not with this machine's clock.
                modified, before = self._modified(phase.name.lower()), self._seen.get(phase)
                self._seen[phase] = modified
                if before is not None and modified != before and self._phase is phase:
                    self._moved = time.monotonic()
            except OSError as error:
                print(f"megadsl: rank {self._rank}: hang watch: {error}", file=sys.stderr, flush=True)

    def _modified(self, name: str) -> int:
        """When a file was last touched, in ns; 0: it is not there."""
        try:
            return (self._folder / name).stat().st_mtime_ns
        except FileNotFoundError:
            return 0

    def _end(self, reason: str) -> None:
        # The others look for the mark in this time; when the first rank is gone a launcher may kill them.
        grace = 3 * self._interval
        leave = threading.Timer(grace + 5, os._exit, [HUNG])  # also where the folder cannot be written for ever
        leave.daemon = True
        leave.start()
        path = self._folder / f"rank-{self._rank}.txt"
        print(
            f"megadsl: rank {self._rank}: {reason}; its Python stack is in {path}; "
            "the run ends, submit it again to go on from its last checkpoint",
            file=sys.stderr, flush=True,
        )
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with path.open("w", encoding="utf-8") as file:
                faulthandler.dump_traceback(file, all_threads=True)
            (self._folder / _MARK).touch()
        except OSError as error:
            print(f"megadsl: rank {self._rank}: {path} cannot be written ({error.strerror}); its stack is:", file=sys.stderr, flush=True)
            faulthandler.dump_traceback(sys.stderr, all_threads=True)
        time.sleep(grace)
        os._exit(HUNG)


def lost_rank(error: BaseException) -> bool:
    """Whether an error of torch.distributed says that another rank is gone or silent. Gloo's are plain RuntimeErrors."""
    distributed = isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and _GLOO.search(str(error)))
    return bool(distributed) and any(word in str(error).lower() for word in _LOST_WORDS)


@contextmanager
def lost_ranks_are_a_sentence(rank: int, run_dir: Path) -> Iterator[None]:
    """Where another rank has gone, say so and exit with code 1; each rank says it, since the first may be the one that died.

    The traceback goes to RUN/stacks. Any other error propagates as it is.
    """
    try:
        yield
    except RuntimeError as error:
        if not lost_rank(error):
            raise
        reason = str(error).strip().splitlines()[0]
        print(
            f"megadsl: rank {rank} has lost another rank ({reason}): a process or node has died, or a collective took longer than "
            f"parallel.timeout_minutes. {_keep_traceback(error, run_dir / 'stacks' / f'lost-rank-{rank}.txt')} "
            "The run ends; submit it again to go on from its last checkpoint.",
            file=sys.stderr, flush=True,
        )
        # Not sys.exit: leaving the process groups in order would wait for the rank that is gone.
        os._exit(1)


def _keep_traceback(error: BaseException, path: Path) -> str:
    """Write it to `path`; the sentence that says where it is."""
    text = "".join(traceback.format_exception(error))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as problem:
        print(text, file=sys.stderr, flush=True)
        return f"The traceback is above ({path} cannot be written: {problem.strerror})."
    return f"The traceback is in {path}."
