"""signal.jsonl and signal.npz of a run: every record on disk, and as many of them in memory as pictures and the npz need.

A run of a million iterations has ten thousand records. The file keeps them all; in memory, and so in the npz, lie at most NUMBERS
numbers: when there are more, every second record is left out, the first and the latest never.
"""

import os
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from megadsl.errors import UserError
from megadsl.monitor.signal import Point, SignalHistory, SignalRecord, points_header

NUMBERS = 5_000_000
_ITERATION = re.compile(rb'\{"iteration": (\d+)')


class SignalLog:
    """The measured signal of one run. Made on one rank only.

    Args:
        points: of the model, the first line of signal.jsonl.
        first_iteration: what is measured anew is dropped: records of first_iteration - 1 (a record counts the steps before it)
            and later ones.

    Raises:
        UserError: signal.jsonl is of another model.
    """

    def __init__(self, run_dir: Path, points: Sequence[Point], first_iteration: int):
        self._path, self._npz = run_dir / "signal.jsonl", run_dir / "signal.npz"
        self._points = list(points)
        places = self._cut(first_iteration - 1)
        self._stride, self._seen = 1, 0  # one record of so many is kept, of so many so far
        self._kept: list[SignalRecord] = []
        self._latest: SignalRecord | None = None
        if places:
            self._load(places)
        self._file = open(self._path, "a", encoding="utf-8")
        if not places:
            self._file.write(points_header(self._points) + "\n")
            self._file.flush()

    def append(self, record: SignalRecord) -> None:
        """Write a record; it is on disk when this returns."""
        self._file.write(record.to_json() + "\n")
        self._file.flush()
        self._keep(record)

    @property
    def history(self) -> SignalHistory:
        """What is in memory; the latest record is always in it."""
        if self._latest is None or self._kept[-1] is self._latest:
            return SignalHistory(self._points, [*self._kept])
        return SignalHistory(self._points, [*self._kept, self._latest])

    def save_npz(self) -> None:
        if self._kept:
            self.history.save_npz(self._npz)

    def close(self) -> None:
        self._file.close()

    def _keep(self, record: SignalRecord) -> None:
        self._latest = replace(record, values={name: np.asarray(row, dtype=np.float32) for name, row in record.values.items()})
        if self._seen % self._stride == 0:
            self._kept.append(self._latest)
        self._seen += 1
        if len(self._kept) > capacity(record):
            self._stride *= 2
            self._kept = self._kept[::2]

    def _cut(self, iteration: int) -> list[int]:
        """End the file before the first record of `iteration` or later; where its lines begin, the points' first."""
        places, end = [], 0
        if self._path.is_file():
            with open(self._path, "rb") as file:
                for line in file:
                    if not line.endswith(b"}\n") or not self._stays(line, not places, iteration):
                        break
                    places.append(end)
                    end += len(line)
            os.truncate(self._path, end if len(places) > 1 else 0)
        return places if len(places) > 1 else []

    def _stays(self, line: bytes, is_header: bool, iteration: int) -> bool:
        if not is_header:
            found = _ITERATION.match(line)
            return found is not None and int(found[1]) < iteration
        if iteration > 0 and line != f"{points_header(self._points)}\n".encode():
            raise UserError(f"{self._path} holds the signal of another model; move it away, or choose another training.run_dir.")
        return True

    def _load(self, places: list[int]) -> None:
        """Records that stay, evenly chosen, so that resuming a long run reads a part of its file."""
        with open(self._path, "rb") as file:
            def read(index: int) -> SignalRecord:
                file.seek(places[index + 1])  # behind the line of points
                return SignalRecord.from_json(file.readline())

            count = len(places) - 1
            room = capacity(read(0))
            while -(-count // self._stride) > room:
                self._stride *= 2
            for self._seen in range(0, count, self._stride):
                self._keep(read(self._seen))
            if self._seen < count:
                self._latest, self._seen = read(count - 1), count


def capacity(record: SignalRecord) -> int:
    """How many records like this one are kept in memory."""
    numbers = sum(len(row) for row in record.values.values()) + sum(len(row) for row in record.parameters.values())
    return max(64, NUMBERS // max(1, numbers))
