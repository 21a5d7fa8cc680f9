"""`megadsl compare`: several runs on one page, by tokens and by time, with what they differ in."""

import json
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megadsl.errors import UserError
from megadsl.monitor.pages.drawings import Curve, lines
from megadsl.monitor.pages.page import Drawing, Page
from megadsl.monitor.pages.run_data import RunData
from megadsl.monitor.pages.run_report import EVALUATION
from megadsl.monitor.pages.signal_parts import DEPTH
from megadsl.monitor.signal import QUANTITIES, predicted

_LAST = 10  # a final loss is the mean over so many iterations
_NOT_COMPARED = ("training.run_dir",)


def run_comparison(runs: Sequence[RunData]) -> Page:
    """The page of two or more runs."""
    page = Page("Comparison: " + ", ".join(run.label for run in runs), f"{len(runs)} runs; a run has the same colour in every figure")
    _numbers(page, runs)
    _differences(page, runs)
    _curves(page, runs)
    _profiles(page, runs)
    remarks = [f"{run.label}: {remark}" for run in runs for remark in run.remarks]
    if remarks:
        page.section("Not there or not readable")
        for remark in remarks:
            page.note(remark)
    page.foot("megadsl compare, " + time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()))
    return page


def _numbers(page: Page, runs: Sequence[RunData]) -> None:
    page.section("Final numbers")
    rows = []
    for run in runs:
        _, losses = run.series("train/loss")
        finite = losses[np.isfinite(losses)]
        done = float(run.metrics[-1]["iteration"]) if run.metrics else 0.0
        end = np.array([done])
        rows.append([
            run.label, int(done), float(finite[-_LAST:].mean()) if finite.size else None, run.last("validation/loss"),
            int(run.tokens(end)[0]) if done else None, float(run.seconds(end)[0]) if done else None,
            run.last("throughput/tokens_per_second"), int((~np.isfinite(losses)).sum()), len(run.alarms), str(run.run_dir),
        ])
    page.table(["run", "iteration", f"loss (mean of the last {_LAST})", "validation loss", "tokens", "seconds", "tokens/s",
                "steps not finite", "alarms", "folder"], rows)
    evaluations = {run.label: run.attempt(EVALUATION, lambda path: dict(json.loads(path.read_text(encoding="utf-8"))), {})
                   for run in runs if (run.run_dir / EVALUATION).is_file()}
    if evaluations:
        names = list(dict.fromkeys(name for numbers in evaluations.values() for name in numbers))
        page.table(["run", *(name.replace("_", " ") for name in names)],
                   [[label, *(numbers.get(name) for name in names)] for label, numbers in evaluations.items()], "Evaluation")
    tasks = {run.task.name for run in runs if run.task}
    if len(tasks) > 1:
        page.note(f"The runs learn different tasks ({', '.join(sorted(tasks))}): their losses are not comparable.", bad=True)


def _differences(page: Page, runs: Sequence[RunData]) -> None:
    page.section("What they differ in")
    settings = [run.settings() for run in runs]
    keys = list(dict.fromkeys(key for values in settings for key in values if key not in _NOT_COMPARED))
    rows = []
    for key in keys:
        shown = [json.dumps(values[key]) if key in values else "not there" for values in settings]
        if len(set(shown)) > 1:
            rows.append([key, *shown])
    if rows:
        page.table(["key", *(run.label for run in runs)], rows)
    else:
        page.text("In no key of their configurations, training.run_dir excepted.")


def _curves(page: Page, runs: Sequence[RunData]) -> None:
    page.section("Curves")
    drawings = []
    for axis, label in (("tokens", "tokens read"), ("seconds", "seconds of training")):
        for key, name, log in (("train/loss", "loss", False), ("validation/loss", "validation loss", False),
                               ("train/grad_norm", "gradient norm", None)):
            drawings += _overlaid(runs, key, f"{name} by {label}", name, axis, label, log)
    drawings += _overlaid(runs, "train/lr", "learning rate by iteration", "learning rate", "", "iteration", False)
    if drawings:
        page.text("Time is that of training: validation and saving are not in it. Tokens are counted without padding.")
        page.figures(drawings)
    else:
        page.note("No run has recorded an iteration.")


def _overlaid(runs: Sequence[RunData], key: str, title: str, name: str, axis: str, label: str, log: bool | None) -> list[Drawing]:
    curves = {}
    for colour, run in enumerate(runs):
        iterations, values = run.series(key)
        x = getattr(run, axis)(iterations) if axis else iterations
        if np.isfinite(x).any() and np.isfinite(values).any():
            curves[run.label] = Curve(x, values, "line" if len(x) > 1 else "dots", colour)
    return [lines(title, curves, label, name, log)] if curves else []


def _profiles(page: Page, runs: Sequence[RunData]) -> None:
    page.section("Signal over depth")
    last = {run.label: (colour, run, run.signal.records[-1]) for colour, run in enumerate(runs) if run.signal.records}
    if len(last) < len(runs):
        missing = ", ".join(run.label for run in runs if run.label not in last)
        page.note(f"No signal was measured in {missing}; the plan is drawn for it (dashed).")
    lengths = {len(run.plan.sublayers) for run in runs if run.plan}
    depth = DEPTH if len(lengths) < 2 else "share of the depth"
    drawings = []
    for quantity, meaning in QUANTITIES.items():
        curves = {}
        for colour, run in enumerate(runs):
            expected = predicted(run.plan, quantity) if run.plan else None
            if expected is not None:
                curves[f"{run.label}, plan"] = Curve(_places(len(expected), depth), expected, "dashes", colour)
            values = last[run.label][2].values.get(quantity) if run.label in last else None
            if values is not None and (known := np.isfinite(values)).any():
                when = last[run.label][2].iteration
                curves[f"{run.label}, iteration {when:,}"] = Curve(_places(len(values), depth)[known], values[known], "line", colour)
        if curves:
            name = quantity.replace("_", " ")
            log = None if quantity in ("forward_second_moment", "gradient_variance", "attention_logit_variance") else False
            drawings.append(lines(name, curves, depth, name, log, f"{name}: {meaning}"))
    if drawings:
        page.figures(drawings)
    else:
        page.note("There is neither a plan nor a measured signal.")


def _places(count: int, depth: str) -> np.ndarray:
    return np.arange(count) if depth == DEPTH else np.linspace(0.0, 1.0, count)


def read_runs(run_dirs: Sequence[Path]) -> list[RunData]:
    """The runs to compare, each under a name of its own.

    Raises:
        UserError: fewer than two, one twice, or one that is no run folder.
    """
    if len(run_dirs) < 2:
        raise UserError("megadsl compare takes two or more run folders; megadsl report shows one.")
    resolved = [path.resolve() for path in run_dirs]
    twice = next((path for path in resolved if resolved.count(path) > 1), None)
    if twice:
        raise UserError(f"{twice} is named twice; name every run once.")
    # The last part of the path, and more of it where that is not enough to tell them apart.
    size = 1
    while len({path.parts[-size:] for path in resolved}) < len(resolved):
        size += 1
    return [RunData.read(path, "/".join(full.parts[-size:])) for path, full in zip(run_dirs, resolved, strict=True)]
