"""A sweep: runs that differ in some keys. Its combinations, one line of overrides each, and the table of what came out."""

import itertools
import json
import statistics
from collections.abc import Iterator
from pathlib import Path

import yaml

from megadsl.errors import UserError
from megadsl.monitor.run_folder import latest, read_metrics

_LAST_ITERATIONS = 10  # a run's loss in the table: the mean over its last ones


def combinations(axes: list[str]) -> list[str]:
    """["lr=1,2", "seed=3,4"] -> one line of overrides for every combination; UserError where an axis is not KEY=A,B,C."""
    overrides = []
    for axis in axes:
        key, equals, values = axis.partition("=")
        if not equals or not all(values.split(",")) or not axis.isprintable() or " " in axis:
            raise UserError(f"--sweep {axis!r} is not KEY=A,B,C, for example --sweep optimizer.lr=1e-3,3e-3.")
        overrides.append([f"{key}={value}" for value in values.split(",")])
    return [" ".join(combination) for combination in itertools.product(*overrides)]


def read_lines(path: Path) -> list[str]:
    """The lines of overrides of a file; empty ones and those that begin with # are none. UserError where there is no such file."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}).") from error
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


def table_over_seeds(runs: list[tuple[str, Path]]) -> Iterator[str]:
    """A line for all runs that differ in training.seed alone: mean and standard deviation of every figure of their evaluations.

    Args:
        runs: (line of overrides, the JSON that `megadsl evaluate --output` wrote).
    """
    groups: dict[str, list[dict]] = {}
    for line, path in runs:
        settings = " ".join(word for word in line.split() if not word.startswith("training.seed="))
        groups.setdefault(settings, []).append(json.loads(path.read_text(encoding="utf-8")))
    for settings, found in groups.items():
        figures = []
        for name in (name for name, value in found[0].items() if isinstance(value, float)):
            values = [one[name] for one in found]
            deviation = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
            figures.append(f"{name.replace('_', ' ')} {statistics.mean(values):.4f}{deviation}")
        yield f"{settings or 'all'} ({len(found)} seed{'s' * (len(found) > 1)}): " + " | ".join(figures)


def results(folder: Path) -> list[list[str]]:
    """A head and a row for each run in `folder`: what they differ in, how far they are, their losses; the best first.

    Raises:
        UserError: there is no run in it.
    """
    runs = sorted(path.parent for path in folder.glob("*/config.yaml"))
    if not runs:
        raise UserError(f"{folder} holds no run folder (with a config.yaml); has a run of the sweep started?")
    configs = [_flat(yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))) for run in runs]
    every = dict.fromkeys(key for config in configs for key in config)
    keys = [key for key in every if key != "training.run_dir" and len({str(config.get(key)) for config in configs}) > 1]
    rows = [[run.name, *(str(config.get(key)) for key in keys), *_outcome(run)] for run, config in zip(runs, configs, strict=True)]
    column = -3 if all(row[-3] != "-" for row in rows) else -2  # validation loss where all have it
    rows.sort(key=lambda row: float(row[column]) if row[column] != "-" else float("inf"))
    return [["run", *keys, "iteration", "validation loss", "loss", "tokens/s"], *rows]


def _outcome(run: Path) -> list[str]:
    metrics = read_metrics(run)
    losses = [record["train/loss"] for record in metrics if record.get("train/loss") is not None][-_LAST_ITERATIONS:]
    validation, rate = latest(metrics, "validation/loss"), latest(metrics, "throughput/tokens_per_second")
    return [
        str(metrics[-1]["iteration"] if metrics else 0), f"{validation:.4f}" if validation is not None else "-",
        f"{sum(losses) / len(losses):.4f}" if losses else "-", f"{rate:,.0f}" if rate else "-",
    ]


def _flat(values: dict, prefix: str = "") -> dict:
    flat = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
