"""Where numbers of a run go: metrics.jsonl (one JSON object a line) and TensorBoard event files."""

import json
import math
from pathlib import Path


class MetricsWriter:
    """Writes scalars by iteration. Made on one rank only.

    Args:
        run_dir: metrics.jsonl and tensorboard/ are written here.
        first_iteration: what an earlier attempt wrote for this iteration and later ones is dropped, so that a resumed
            run continues one curve.
        tensorboard: also write event files.
    """

    def __init__(self, run_dir: Path, first_iteration: int, tensorboard: bool):
        run_dir.mkdir(parents=True, exist_ok=True)
        path = run_dir / "metrics.jsonl"
        _drop_from(path, first_iteration)
        self._file = open(path, "a", encoding="utf-8")
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
