"""Where numbers of a run go: metrics.jsonl and signal.jsonl (one JSON object a line), signal.npz, and what shows them (TensorBoard, W&B)."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from megadsl.config import Config
from megadsl.monitor.display import Display, EventFiles
from megadsl.monitor.drawing import Drawing
from megadsl.monitor.names import shown
from megadsl.monitor.pictures import PictureMaker
from megadsl.monitor.plan_text import plan_text
from megadsl.monitor.signal import SignalRecord, points_of
from megadsl.monitor.signal_log import SignalLog
from megadsl.monitor.signal_scalars import signal_scalars, where_text
from megadsl.monitor.wandb_run import WandbRun
from megadsl.schemes.plan import SignalPlan

# What runs are compared by, on TensorBoard's page HParams and in W&B's table of runs. More would hide what differs.
_COMPARED = {
    "scheme": ("name",), "model": ("family", "num_layers", "hidden_size", "norm_position", "activation", "seq_length"),
    "optimizer": ("lr", "lr_decay_style", "lr_warmup_iters", "weight_decay", "clip_grad"),
    "training": ("train_iters", "global_batch_size", "precision", "seed"),
    "parallel": ("tensor_model_parallel_size", "pipeline_model_parallel_size", "zero_stage"),
}


class MetricsWriter:
    """Writes what a run measures, by iteration. Made on one rank only.

    Args:
        run_dir: metrics.jsonl and the signal's files are written here.
        first_iteration: what an earlier attempt wrote for this iteration and later ones is dropped, so that a resumed
            run continues one curve.
        displays: what also shows the numbers.
        plan: the run's, where its signal is measured.
        title: which model it is, in a few words.
        figure_interval: iterations between two sets of pictures at least; 0: no pictures.
        log: gets a line where a picture fails.
    """

    def __init__(self, run_dir: Path, first_iteration: int, displays: Sequence[Display] = (), plan: SignalPlan | None = None, title: str = "",
                 figure_interval: int = 0, log: Callable[[str], None] = print):
        run_dir.mkdir(parents=True, exist_ok=True)
        path = run_dir / "metrics.jsonl"
        _drop_from(path, first_iteration)
        self._file = open(path, "a", encoding="utf-8")
        self._displays, self._plan = list(displays), plan
        self._signal = self._drawing = None
        if plan is not None:
            self._signal = SignalLog(run_dir, points_of(plan), first_iteration)
            if figure_interval and self._displays:
                self._maker = PictureMaker(plan, title)
                self._drawing = Drawing(figure_interval, self._maker.add, self._draw, log)
                for record in self._signal.history.records:
                    self._maker.add(record)  # so that heat maps of a resumed run begin at its beginning

    @classmethod
    def of_run(cls, config: Config, plan: SignalPlan, first_iteration: int, log: Callable[[str], None]) -> "MetricsWriter":
        """The writer that a configuration asks for; its pages of text are written."""
        run_dir, monitor = Path(config.training.run_dir), config.monitor
        displays: list[Display] = [WandbRun(run_dir, monitor)] if monitor.wandb else []
        if monitor.tensorboard:
            displays.append(EventFiles(run_dir / "tensorboard" / run_dir.resolve().name, first_iteration))
        # A set of pictures is half a megabyte of event file: by default a run draws a hundred at most.
        interval = max(1, config.training.train_iters // 100) if monitor.figure_interval is None else monitor.figure_interval
        writer = cls(run_dir, first_iteration, displays, plan, title := title_of(config), interval, log)
        writer.write_text("plan", plan_text(plan, title))
        writer.write_text("config", _indented((run_dir / "config.yaml").read_text(encoding="utf-8")))
        for display in displays:
            display.hyperparameters(hyperparameters(config))
        return writer

    def write(self, iteration: int, scalars: dict[str, float]) -> None:
        """Record scalars such as {"train/loss": 3.2} of one iteration."""
        # JSON has no NaN; a reader in another language would stumble over one.
        finite = {name: value if math.isfinite(value) else None for name, value in scalars.items()}
        self._file.write(json.dumps({"iteration": iteration, **finite}) + "\n")
        for display in self._displays:
            display.scalars(iteration, {shown(name): value for name, value in scalars.items()})

    def write_signal(self, record: SignalRecord) -> None:
        """Record what was measured at one iteration: signal.jsonl, its scalars, and pictures where they are due."""
        if self._signal is None:
            return
        self._signal.append(record)
        if self._displays:
            scalars = {scalar.name: scalar.value for scalar in signal_scalars(self._plan, record)}
            for display in self._displays:
                display.scalars(record.iteration, scalars)
        if self._drawing is not None:
            self._drawing.add(record)

    def write_text(self, name: str, text: str, iteration: int = 0) -> None:
        """A page of Markdown."""
        for display in self._displays:
            display.text(name, text, iteration)

    def save(self) -> None:
        """What a run that resumes from here, or somebody who looks on now, must find on disk."""
        self.flush()
        if self._signal is not None:
            self._signal.save_npz()

    def flush(self) -> None:
        self._file.flush()
        for display in self._displays:
            display.flush()

    def close(self) -> None:
        if self._drawing is not None:
            self._drawing.close()
        if self._signal is not None:
            self._signal.save_npz()
            self._signal.close()
        self._file.close()
        for display in self._displays:
            display.close()

    def _draw(self, record: SignalRecord) -> None:
        """In the drawing thread: pictures, histograms and where the scalars were found."""
        histograms = _histograms(self._plan, record)
        for picture in self._maker.draw(record):
            for display in self._displays:
                display.picture(picture.name, picture.pixels, record.iteration)
        where = where_text(record.iteration, signal_scalars(self._plan, record))
        for display in self._displays:
            for name, values in histograms.items():
                display.histogram(name, values, record.iteration)
            display.text("signal/where", where, record.iteration)
            display.flush()


def title_of(config: Config) -> str:
    """A model in a few words."""
    model = config.model
    layers = " + ".join(map(str, model.stack_layers.values()))
    return f"{model.family.replace('_', '-')}, {layers} layers x {model.hidden_size}, {config.scheme.name}"


def hyperparameters(config: Config) -> dict[str, str | int | float | bool]:
    """By key of the configuration; numbers and words only."""
    values = config.model_dump()
    return {f"{section}.{key}": values[section][key] for section, keys in _COMPARED.items() for key in keys}


def _histograms(plan: SignalPlan, record: SignalRecord) -> dict[str, np.ndarray]:
    """How the layers and the parameters are spread: log10 of each, where it is positive."""
    with np.errstate(divide="ignore", invalid="ignore"):
        rows = {
            **{f"signal/{quantity}_log10": np.log10(record.values[quantity])
               for quantity in ("forward_second_moment", "gradient_variance") if quantity in record.values},
            **{f"weights/{quantity}_log10": np.log10([*row.values()]) for quantity, row in record.parameters.items()},
        }
    finite = {name: row[np.isfinite(row)] for name, row in rows.items()}
    return {name: row for name, row in finite.items() if len(row)}


def _indented(text: str) -> str:
    return "    " + text.replace("\n", "\n    ")  # Markdown shows it as it is


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
