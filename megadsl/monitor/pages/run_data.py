"""What lies in a run folder, read for a page: what is missing or damaged becomes a line in `remarks`, never an exception."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import numpy as np

from megadsl.checkpoint.manifest import DamagedCheckpoint, check_sizes, read_manifest
from megadsl.checkpoint.store import Checkpoint, CheckpointStore
from megadsl.config import Config
from megadsl.config.load import load_saved_config, parse_config
from megadsl.errors import UserError
from megadsl.monitor.signal import SignalHistory
from megadsl.schemes.plan import SignalPlan
from megadsl.tasks.registry import resolved, task_of
from megadsl.tasks.task import Task

Found = TypeVar("Found")


@dataclass(frozen=True)
class StoredCheckpoint:
    """A checkpoint folder of the run; `problem`: why it cannot be used, "" where it can (files have their sizes; sums are not taken)."""

    path: Path
    checkpoint: Checkpoint | None
    problem: str

    @property
    def bytes(self) -> int | None:
        return sum(record.bytes for record in self.checkpoint.manifest.files.values()) if self.checkpoint else None


@dataclass
class RunData:
    """A run as it lies on disk.

    Attributes:
        label: what the run is called on a page.
        metrics: the records of metrics.jsonl, oldest first.
        remarks: a line for each file that is missing or damaged.
    """

    run_dir: Path
    label: str
    config: Config
    plan: SignalPlan | None = None
    metrics: list[dict] = field(default_factory=list)
    signal: SignalHistory = field(default_factory=lambda: SignalHistory([]))
    alarms: list[dict] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    @classmethod
    def read(cls, run_dir: Path, label: str | None = None) -> "RunData":
        """UserError where `run_dir` is no run folder."""
        path = run_dir / "config.yaml"
        if not path.is_file():
            raise UserError(f"{run_dir} is no run folder: it has no config.yaml; give the training.run_dir of a run.")
        run = cls(run_dir, label or run_dir.resolve().name, load_saved_config(path))
        run.plan = run.attempt("plan.json", lambda file: SignalPlan.from_json(file.read_text(encoding="utf-8")), None)
        run.metrics = [record for record in run.attempt("metrics.jsonl", run.records, []) if "iteration" in record]
        if (run_dir / "signal.jsonl").is_file():
            run.signal = run.attempt("signal.jsonl", SignalHistory.read, run.signal)
            if not run.signal.points:
                run.remarks.append("signal.jsonl holds no measurement that can be read.")
        if (run_dir / "alarms.jsonl").is_file():
            run.alarms = run.attempt("alarms.jsonl", run.records, [])
        return run

    def attempt(self, name: str, read: Callable[[Path], Found], otherwise: Found) -> Found:
        """read(RUN/name); where that fails, `otherwise` and a remark."""
        path = self.run_dir / name
        try:
            return read(path)
        except FileNotFoundError:
            self.remarks.append(f"{name} is not there.")
        except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            self.remarks.append(f"{name} is damaged and was left out ({type(error).__name__}: {error}).")
        return otherwise

    def records(self, path: Path) -> list[dict]:
        """The objects of a file of JSON lines; lines that are none are counted in a remark (the last one may be being written)."""
        found, broken = [], 0
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        for number, line in enumerate(lines, 1):
            try:
                value = json.loads(line)
            except ValueError:
                value = None
            if isinstance(value, dict):
                found.append(value)
            else:
                broken += number < len(lines)
        if broken:
            self.remarks.append(f"{path.name} has {broken} lines that cannot be read; they were left out.")
        return found

    def series(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        """(iterations, values) of what metrics.jsonl says of `key`; what was not finite is NaN."""
        rows = [(record["iteration"], record[key]) for record in self.metrics if key in record]
        values = [value if isinstance(value, int | float) else np.nan for _, value in rows]
        return np.array([iteration for iteration, _ in rows], float), np.array(values, float)

    def last(self, key: str) -> float | None:
        """The newest finite value of `key`."""
        _, values = self.series(key)
        finite = values[np.isfinite(values)]
        return float(finite[-1]) if finite.size else None

    def seconds(self, iterations: np.ndarray) -> np.ndarray:
        """Time spent on training up to these iterations; validation and saving are not in it."""
        return self._summed(iterations, self.series("throughput/seconds_per_iteration")[1])

    def tokens(self, iterations: np.ndarray) -> np.ndarray:
        """Tokens read up to these iterations, without padding; all positions where the run has logged no rate."""
        rate = self.series("throughput/tokens_per_second")[1] * self.series("throughput/seconds_per_iteration")[1]
        if np.isfinite(rate).any():
            return self._summed(iterations, rate)
        return iterations * self.config.training.global_batch_size * sum(self.config.model.stack_lengths.values())

    def _summed(self, iterations: np.ndarray, per_iteration: np.ndarray) -> np.ndarray:
        """The sum of a number that is logged as a mean over an interval, at any iteration."""
        logged, _ = self.series("throughput/seconds_per_iteration")
        if not logged.size:
            return np.full(len(iterations), np.nan)
        edges = np.concatenate([[0.0], logged])
        sums = np.concatenate([[0.0], np.cumsum(np.diff(edges) * np.nan_to_num(per_iteration))])
        return np.interp(iterations, edges, sums)

    @cached_property
    def task(self) -> Task | None:
        """The run's task; None, with a remark, where it cannot be made here (a package is missing)."""
        try:
            return task_of(self.config)
        except (UserError, ImportError) as error:
            self.remarks.append(f"The task of the run is not known here: {error}")
            return None

    @cached_property
    def checkpoints(self) -> list[StoredCheckpoint]:
        """Oldest first."""
        found = []
        for path in sorted(CheckpointStore(self.run_dir / "checkpoints").candidates()):
            checkpoint, problem = None, ""
            try:
                checkpoint = Checkpoint(path, read_manifest(path))
                check_sizes(path, checkpoint.manifest)
            except DamagedCheckpoint as error:
                problem = str(error)
            found.append(StoredCheckpoint(path, checkpoint, problem))
        return found

    def settings(self) -> dict[str, object]:
        """Every key of the configuration with its value, options of the task included."""
        return flat(resolved(self.config).model_dump(mode="json") if self.task else self.config.model_dump(mode="json"))

    def changed_settings(self) -> dict[str, tuple[object, object]]:
        """key -> (value, default) of what differs from the defaults of this family and task."""
        values = self.settings()
        given = {"model": {"family": self.config.model.family}}
        if self.task:
            given["task"] = {"name": self.task.name}
            defaults = flat(resolved(parse_config(given)).model_dump(mode="json"))
        else:
            defaults = flat(parse_config(given).model_dump(mode="json"))
        return {key: (value, defaults.get(key)) for key, value in values.items() if value != defaults.get(key)}


def flat(values: dict, prefix: str = "") -> dict[str, object]:
    """{"a": {"b": 1}} -> {"a.b": 1}; lists stay."""
    found = {}
    for key, value in values.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found
