"""Where numbers of a run go: metrics.jsonl (one JSON object a line) and TensorBoard event files."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from megadsl.data.atomic_files import written_atomically
from megadsl.monitor.signal import Point, SignalHistory, SignalRecord, points_header


class MetricsWriter:
    """Writes scalars by iteration. Made on one rank only.

    Args:
        run_dir: metrics.jsonl and tensorboard/ are written here.
        first_iteration: what an earlier attempt wrote for this iteration and later ones is dropped, so that a resumed
            run continues one curve.
        tensorboard: also write event files.
        points: of the model, for signal.jsonl.
    """

    def __init__(self, run_dir: Path, first_iteration: int, tensorboard: bool, points: Sequence[Point] = ()):
        run_dir.mkdir(parents=True, exist_ok=True)
        path = run_dir / "metrics.jsonl"
        _drop_from(path, first_iteration)
        self._file = open(path, "a", encoding="utf-8")
        self._signal = _signal_file(run_dir / "signal.jsonl", first_iteration, points) if points else None
        self._events = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._events = SummaryWriter(str(run_dir / "tensorboard"), purge_step=first_iteration)

    def write(self, iteration: int, scalars: dict[str, float]) -> None:
        """Record scalars such as {"train/loss": 3.2} of one iteration."""
        # JSON has no NaN; a reader in another language would stumble over one.
        finite = {name: value if math.isfinite(value) else None for name, value in scalars.items()}
        self._file.write(json.dumps({"iteration": iteration, **finite}) + "\n")
        if self._events is not None:
            for name, value in scalars.items():
                self._events.add_scalar(name, value, iteration)

    def write_signal(self, record: SignalRecord) -> None:
        """Append a record to signal.jsonl."""
        if self._signal is None:
            return
        self._signal.write(record.to_json() + "\n")
        self._signal.flush()

    def write_text(self, name: str, text: str, iteration: int | None = None) -> None:
        """A text page in TensorBoard, of one iteration or of the run."""
        if self._events is not None:
            self._events.add_text(name, text, iteration)

    def flush(self) -> None:
        self._file.flush()
        if self._events is not None:
            self._events.flush()

    def close(self) -> None:
        self._file.close()
        if self._signal is not None:
            self._signal.close()
        if self._events is not None:
            self._events.close()


def _drop_from(path: Path, first_iteration: int) -> None:
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["iteration"] < first_iteration:
                kept.append(line + "\n")
        except (ValueError, KeyError):
            continue  # a line cut short by a kill
    path.write_text("".join(kept), encoding="utf-8")


def _signal_file(path: Path, first_iteration: int, points: Sequence[Point]) -> TextIO:
    """signal.jsonl, opened to append; what an earlier attempt wrote for first_iteration (counted from 1) and later ones is dropped."""
    kept = [record for record in SignalHistory.read(path).records if record.iteration < first_iteration - 1]
    with written_atomically(path) as temporary:
        temporary.write_text("".join(f"{line}\n" for line in (points_header(points), *(record.to_json() for record in kept))), encoding="utf-8")
    return open(path, "a", encoding="utf-8")
