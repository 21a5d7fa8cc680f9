"""`megadsl report`: one page of a run, from what lies in its folder."""

import json
import math
import time

import numpy as np
import yaml

from megadsl.monitor.pages.drawings import TEXT, Curve, lines
from megadsl.monitor.pages.page import Drawing, Page
from megadsl.monitor.pages.run_data import RunData
from megadsl.monitor.pages.signal_parts import DEPTH, agreement_table, maps, profiles, worst_table
from megadsl.monitor.progress import duration
from megadsl.monitor.signal import SignalRecord, predicted
from megadsl.schemes.plan import SignalPlan

EVALUATION, SAMPLE = "evaluation.json", "sample.txt"
_SHOWN_ALARMS = 100


def run_report(run: RunData) -> Page:
    """The page of a run; a section that has nothing to show says so in a line."""
    page = Page(f"Run {run.label}", str(run.run_dir))
    _overview(page, run)
    _model(page, run)
    _signal(page, run)
    _curves(page, run)
    _alarms(page, run)
    _attempts(page, run)
    _throughput(page, run)
    _checkpoints(page, run)
    _results(page, run)
    _configuration(page, run)
    if run.remarks:
        page.section("Not there or not readable")
        for remark in run.remarks:
            page.note(remark)
    page.foot(f"megadsl report, {_clock(time.time())}")
    return page


def _overview(page: Page, run: RunData) -> None:
    done = int(run.metrics[-1]["iteration"]) if run.metrics else 0
    iterations, losses = run.series("train/loss")
    finite = losses[np.isfinite(losses)]
    seconds = run.seconds(np.array([float(done)]))[0]
    page.facts({
        "iterations": f"{done:,} of {run.config.training.train_iters:,}", "first loss": float(finite[0]) if finite.size else None,
        "last loss": float(finite[-10:].mean()) if finite.size else None, "validation loss": run.last("validation/loss"),
        "tokens read": int(run.tokens(np.array([float(done)]))[0]) if done else None,
        "training time": duration(seconds) if math.isfinite(seconds) and done else None,
        "steps not finite": int((~np.isfinite(losses)).sum()) if len(iterations) else None, "alarms": len(run.alarms),
    })
    if not run.metrics:
        page.note("No iteration is recorded yet.")
    elif done < run.config.training.train_iters:
        page.note("The run is not at its end; megadsl train with the same arguments goes on with it.")


def _model(page: Page, run: RunData) -> None:
    page.section("Model")
    model, parameters = run.config.model, _parameters(run)
    layers = " + ".join(f"{count} {stack}" for stack, count in model.stack_layers.items())
    page.facts({
        "task": (run.task.name if run.task else run.config.task.name or "not known").replace("_", " "), "scheme": run.config.scheme.name, "layers": layers,
        "width": model.hidden_size, "heads": model.num_attention_heads, "norms": model.norm_position,
        "positions": " + ".join(str(length) for length in model.stack_lengths.values()), "parameters": parameters,
        "precision": run.config.training.precision,
    })
    if parameters is None:
        page.note("The number of parameters is read from a checkpoint; there is none yet.")


def _parameters(run: RunData) -> int | None:
    """Of the newest complete checkpoint."""
    usable = [stored.checkpoint for stored in run.checkpoints if not stored.problem]
    if not usable:
        return None
    # Not at the top: it loads torch.
    from megadsl.checkpoint.weights import TensorReader

    with TensorReader(usable[-1].path, usable[-1].manifest) as reader:
        return sum(math.prod(reader.shape("weights", name)) for name in reader.names("weights"))


def _signal(page: Page, run: RunData) -> None:
    page.section("Signal: plan against measured")
    records = {_when(record): record for record in (*run.signal.records[:1], *run.signal.records[-1:])}
    if not records:
        page.note("No signal was measured in this run (there is no signal.jsonl); what the plan expects is shown alone.")
    if run.plan is None:
        page.note("There is no plan.json to compare with.")
    drawings = profiles(run.plan, records) if records else _plan_alone(run.plan)
    if drawings:
        page.figures(drawings)
    if run.plan is not None and records:
        agreement_table(page, run.plan, records)
        label, record = list(records.items())[-1]
        worst_table(page, run.plan, record, f"The points farthest from the plan, {label}. A trained model leaves its plan: what counts "
                    "is that it leaves it slowly and at no single place.")
    if len(run.signal.records) > 2:
        page.heading("Over the run")
        page.figures(maps(run.signal))


def _when(record: SignalRecord) -> str:
    return "before the first step" if record.iteration == 0 else f"iteration {record.iteration:,}"


def _plan_alone(plan: SignalPlan | None) -> list[Drawing]:
    if plan is None:
        return []
    drawings = []
    for quantity in ("forward_second_moment", "token_correlation", "gradient_variance"):
        values = predicted(plan, quantity)
        name = quantity.replace("_", " ")
        drawings.append(lines(f"{name}, planned", {"plan": Curve(np.arange(len(values)), values, "dashes", TEXT)},
                              DEPTH, name, False if quantity == "token_correlation" else None))
    return drawings


def _curves(page: Page, run: RunData) -> None:
    page.section("Curves")
    drawings = []
    training, validation = run.series("train/loss"), run.series("validation/loss")
    losses = {"training": Curve(*training)} if training[0].size else {}
    if validation[0].size:
        losses["validation"] = Curve(*validation, "line" if validation[0].size > 1 else "dots", 1)
    if losses:
        drawings.append(lines("loss", losses, "iteration", "loss", False))
    parts = sorted({key for record in run.metrics for key in record if key.startswith(("train/", "validation/"))})
    single = {"train/loss", "validation/loss", "train/lr", "train/grad_norm", "train/skipped_iterations"}
    for key, label, log in (("train/grad_norm", "gradient norm", None), ("train/lr", "learning rate", False),
                            *((part, part, False) for part in parts if part not in single)):
        iterations, values = run.series(key)
        if iterations.size:
            drawings.append(lines(label, {label: Curve(iterations, values)}, "iteration", label, log))
    if drawings:
        page.figures(drawings)
    else:
        page.note("There is nothing to draw: metrics.jsonl holds no iteration.")


def _alarms(page: Page, run: RunData) -> None:
    page.section("Alarms")
    if not run.alarms:
        page.text("None.")
        return
    first = ("iteration", "alarm", "where", "text")
    more = sorted({key for alarm in run.alarms for key in alarm if key not in first})
    rows = [[alarm.get("iteration"), *(_words(alarm.get(key)) for key in (*first[1:], *more))] for alarm in run.alarms[-_SHOWN_ALARMS:]]
    page.table([*first, *more], rows, f"The last {_SHOWN_ALARMS} of {len(run.alarms):,}." if len(run.alarms) > _SHOWN_ALARMS else "")


def _words(value: object) -> str:
    return "" if value is None else value if isinstance(value, str) else json.dumps(value)


def _attempts(page: Page, run: RunData) -> None:
    page.section("Starts and restarts")
    # Every start of the training program opens one event file, named by its time.
    names = [path.name.split(".") for path in (run.run_dir / "tensorboard").rglob("events.out.tfevents.*")]
    starts = sorted({(int(name[3]), ".".join(name[4:-2])) for name in names if len(name) > 4 and name[3].isdigit()})
    if starts:
        page.table(["start", "at", "host"], [[number, _clock(seconds), host] for number, (seconds, host) in enumerate(starts, 1)])
    else:
        page.note("How often the run was started is read from its TensorBoard files; there are none.")
    if (run.run_dir / "slurm.json").is_file():
        job = run.attempt("slurm.json", lambda path: json.loads(path.read_text(encoding="utf-8")), {})
        if isinstance(job, dict) and job:
            page.text(f"SLURM job {job.get('job')}, restart {job.get('restarts')}, on {job.get('nodes') or 'unknown nodes'}.")


def _clock(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(seconds))


def _throughput(page: Page, run: RunData) -> None:
    page.section("Throughput")
    keys = sorted({key for record in run.metrics for key in record if key.startswith(("throughput/", "memory/"))})
    rows, drawings = [], []
    for key in keys:
        iterations, values = run.series(key)
        finite = values[np.isfinite(values)]
        name = key.partition("/")[2].replace("_", " ")
        if finite.size:
            rows.append([name, float(np.median(finite)), float(finite.min()), float(finite.max()), float(finite[-1])])
        if key in ("throughput/tokens_per_second", "memory/peak_gib") and finite.size > 1:
            drawings.append(lines(name, {name: Curve(iterations, values)}, "iteration", name, False))
    if not rows:
        page.note("No rate was logged yet (every monitor.log_interval iterations).")
        return
    page.table(["", "median", "smallest", "largest", "last"], rows, "Means over a log interval. Padding is not counted as tokens.")
    page.figures(drawings)


def _checkpoints(page: Page, run: RunData) -> None:
    page.section("Checkpoints")
    if not run.checkpoints:
        page.note("There are none.")
        return
    rows = []
    for stored in run.checkpoints:
        info = stored.checkpoint.info if stored.checkpoint else None
        layout = f"tensor {info.tensor} x pipeline {info.pipeline} x data {info.data}, ZeRO {info.zero_stage}" if info else ""
        rows.append([stored.path.name, info.iteration if info else None, info.loss if info else None,
                     f"{stored.bytes / 2**20:,.1f} MiB" if stored.bytes else "", layout, stored.problem or "complete"])
    page.table(["folder", "iteration", "loss", "size", "saved with", "state"], rows,
               "Sizes were compared, checksums not: megadsl checkpoint inspect reads every file.")


def _results(page: Page, run: RunData) -> None:
    page.section("Evaluation and a sample")
    if (run.run_dir / EVALUATION).is_file():
        numbers = run.attempt(EVALUATION, lambda path: dict(json.loads(path.read_text(encoding="utf-8"))), {})
        page.facts({name.replace("_", " "): value for name, value in numbers.items()})
    else:
        page.note(f"There is no {EVALUATION}; megadsl evaluate RUN --data DATA --output RUN/{EVALUATION} writes it.")
    if (run.run_dir / SAMPLE).is_file():
        page.heading("Sample")
        page.verbatim(run.attempt(SAMPLE, lambda path: path.read_text(encoding="utf-8", errors="replace"), ""))
    else:
        page.note(f"There is no {SAMPLE}; megadsl generate RUN --output RUN/{SAMPLE} writes it, for a task that writes text.")


def _configuration(page: Page, run: RunData) -> None:
    page.section("Configuration")
    rows = [[key, _setting(value), _setting(default)] for key, (value, default) in run.changed_settings().items()]
    page.table(["key", "this run", "default"], rows, "What differs from the defaults.")
    page.folded("The whole configuration", yaml.safe_dump(run.config.model_dump(mode="json"), sort_keys=False))
    versions = next((stored.checkpoint.info.versions for stored in reversed(run.checkpoints) if stored.checkpoint), None)
    if versions:
        page.text("Versions: " + ", ".join(f"{name} {version}" for name, version in versions.items()) + ".")


def _setting(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)
