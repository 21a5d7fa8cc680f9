"""Pictures of the measured signal: profiles over depth and heat maps over depth and time.

matplotlib is imported when the first picture is drawn, and only its Figure and Agg canvas: there is no pyplot and so no global state,
and a thread of its own may draw. Colours are those of Okabe and Ito and of matplotlib's colour-blind safe maps.
Shape letters: P points over depth, R measured records.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from megadsl.monitor.depth_timeline import DepthTimeline, pooled_rows
from megadsl.monitor.names import HISTORY, PARTS, PROFILE
from megadsl.monitor.signal import PREDICTED, QUANTITIES, Point, SignalRecord, points_of, predicted
from megadsl.schemes.plan import SignalPlan

PLAN, BAND, FAINT = "#000000", "#bbbbbb", "#999999"
# By kind of point: colour, marker, name in the legend.
KINDS = {
    "self_attention": ("#0072b2", "o", "self-attention"), "ffn": ("#d55e00", "s", "ffn"),
    "cross_attention": ("#009e73", "^", "cross-attention"), "": ("#cc79a7", "D", "ends"),
}
WITHIN = 0.1  # the band around the plan that a good initialisation lies in
LOGARITHMIC = ("forward_second_moment", "gradient_variance", "attention_logit_variance", "attention_logit_max")
# What a healthy model shows.
GOOD = {
    "forward_second_moment": "in the band at iteration 0, then without jumps from layer to layer",
    "gradient_variance": "in the band at iteration 0; later no layer far from the others",
    "token_correlation": "on the line at iteration 0; near 1 all tokens are alike (rank collapse)",
    "gradient_correlation": "on the line at iteration 0",
    "forward_mean": "small beside the root of the second moment",
    "attention_logit_variance": "about 1 or less at the start; slow growth",
    "attention_logit_max": "below some 50; steady growth comes before a loss spike",
    "attention_entropy": "no layer falls to 0 (each query sees one key)",
    "dead_activations": "far below 0.5, and not growing",
    "angular_distance": "no layer at 0 (a layer that changes nothing)",
}
LABELS = {"forward_second_moment": "second moment", "gradient_variance": "gradient variance"}
# Heat maps: quantity -> title.
HEAT_MAPS = {
    "forward_second_moment": "forward second moment, measured / plan",
    "gradient_variance": "gradient variance, measured / plan",
    "attention_logit_max": "largest attention logit",
}
_ROWS = 400  # of a heat map
_TINY = 1e-30
_UNBOUNDED = 1e30  # what stands for infinity


@dataclass(frozen=True)
class Picture:
    """A picture to show: [height, width, 3] bytes."""

    name: str
    pixels: np.ndarray


class PictureMaker:
    """Draws the pictures of one run; `title` says which model it is."""

    def __init__(self, plan: SignalPlan, title: str):
        self.points = points_of(plan)
        self._title = title
        self._planned = {name: predicted(plan, name) for name in PREDICTED}
        self._first: SignalRecord | None = None
        self._timelines = {name: DepthTimeline(len(self.points)) for name in HEAT_MAPS}

    def add(self, record: SignalRecord) -> None:
        """Take a record into the heat maps; the first one is shown in grey behind the newest."""
        if self._first is None:
            self._first = record
        for name, timeline in self._timelines.items():
            if name in record.values:
                timeline.add(record.iteration, self._heat(name, record.values[name]))

    def draw(self, record: SignalRecord) -> Iterator[Picture]:
        """All pictures; a quantity that was not measured has none."""
        for quantity in QUANTITIES:
            if quantity in record.values and np.isfinite(record.values[quantity]).any():
                group = PROFILE if quantity in PREDICTED else PARTS
                yield Picture(f"{group}/{quantity}", _pixels(self.profile(quantity, record)))
        for quantity, timeline in self._timelines.items():
            if np.isfinite(timeline.values).any():
                yield Picture(f"{HISTORY}/{quantity}", _pixels(self.heat_map(quantity)))

    def profile(self, quantity: str, record: SignalRecord):
        """A matplotlib Figure: a quantity over depth, the plan's line under the measured points."""
        figure, axis = _figure()
        measured, planned = _finite(record.values[quantity]), self._planned.get(quantity)
        if planned is not None:
            for number, (begin, end) in enumerate(self._stretches()):
                xs, line = range(begin, end), planned[begin:end]
                hidden = "_" * bool(number)  # in the legend once
                axis.fill_between(xs, line * (1 - WITHIN), line * (1 + WITHIN), color=BAND, alpha=0.5, linewidth=0,
                                  label=f"{hidden}plan ±{WITHIN:.0%}")
                axis.plot(xs, line, color=PLAN, linewidth=1.2, label=f"{hidden}plan")
        first = self._first
        if first is not None and first.iteration < record.iteration and quantity in first.values:
            for number, (begin, end) in enumerate(self._stretches()):
                xs = begin + np.flatnonzero(np.isfinite(first.values[quantity][begin:end]))
                axis.plot(xs, first.values[quantity][xs], color=FAINT, linewidth=1.0, linestyle=":",
                          label="_" * bool(number) + f"iteration {first.iteration}")
        self._markers(axis, measured)
        _limit(axis, quantity, [measured, planned])
        self._depth_axis(axis.xaxis, axis.axvline)
        axis.set_ylabel(LABELS.get(quantity, quantity.replace("_", " ")))
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        legend = axis.legend(loc="upper left", bbox_to_anchor=(-0.12, -0.22), ncols=7, frameon=False, fontsize=8, handletextpad=0.3,
                             columnspacing=0.8, handlelength=1.1, borderaxespad=0.0)
        for handle in legend.legend_handles:
            if hasattr(handle, "set_markersize"):
                handle.set_markersize(5.0)
        axis.set_xlabel(f"layer ({self._title})", fontsize=9)
        _titles(axis, f"{quantity.replace('_', ' ')}, iteration {record.iteration}", self._verdict(quantity, measured, planned), f"good: {GOOD[quantity]}")
        return figure

    def heat_map(self, quantity: str):
        """A matplotlib Figure: iterations to the right, depth upwards."""
        figure, axis = _figure(below=0.14)
        timeline = self._timelines[quantity]
        values, edges = pooled_rows(timeline.values, _ROWS), timeline.edges
        depths = np.minimum(np.arange(len(values) + 1) * -(-len(self.points) // _ROWS), len(self.points)) - 0.5
        if quantity in PREDICTED:
            largest = min(3.0, max(np.log10(2.0), float(np.nanmax(np.abs(np.where(np.isfinite(values), values, 0.0))))))
            colours = {"cmap": "PuOr_r", "vmin": -largest, "vmax": largest}
        else:
            # A layer without attention between two with it would draw stripes.
            values, depths = self._filled(values, depths)
            colours = {"cmap": "viridis", "vmin": 0.0, "vmax": max(1.0, min(1e4, float(np.nanmax(values))))}
        mesh = axis.pcolormesh(edges, depths, np.ma.masked_invalid(values), rasterized=True, **colours)
        axis.set_facecolor("#dddddd")
        bar = figure.colorbar(mesh, ax=axis, pad=0.02)
        if quantity in PREDICTED:
            ticks = _ratio_ticks(largest)
            bar.set_ticks(np.log10(ticks), labels=[f"{tick:g}" for tick in ticks])
        self._depth_axis(axis.yaxis, axis.axhline)
        axis.set_xlabel(f"iteration ({self._title})", fontsize=9)
        axis.set_ylabel("layer" if len(self._stretches()) == 1 else "")  # ticks with names of stacks say it themselves
        good = "pale everywhere; the first dark spot is where trouble starts" if quantity in PREDICTED else GOOD[quantity]
        _titles(axis, HEAT_MAPS[quantity], f"over depth, to iteration {timeline.latest}", f"good: {good}")
        return figure

    def _heat(self, quantity: str, values: np.ndarray) -> np.ndarray:
        """What a heat map colours: log10 of measured over plan, or the number itself."""
        planned = self._planned.get(quantity)
        bounded = np.clip(values, -_UNBOUNDED, _UNBOUNDED)
        if planned is None:
            return bounded
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(planned > 0, np.log10(np.maximum(bounded, _TINY) / planned), np.nan)

    def _filled(self, values: np.ndarray, depths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Only rows that hold numbers, each as high as the gap to the next."""
        rows = np.flatnonzero(np.isfinite(values).any(axis=1))
        return values[rows], np.array([*depths[rows], depths[-1]])

    def _markers(self, axis, measured: np.ndarray) -> None:
        kinds = np.array([point.kind for point in self.points])
        size = float(np.clip(900.0 / len(self.points), 1.8, 4.0))
        for kind, (colour, marker, label) in KINDS.items():
            xs = np.flatnonzero((kinds == kind) & np.isfinite(measured))
            if len(xs):
                axis.plot(xs, measured[xs], marker, color=colour, markersize=size if kind else 5.0, markeredgewidth=0, label=label, alpha=0.8)

    def _verdict(self, quantity: str, measured: np.ndarray, planned: np.ndarray | None) -> str:
        if planned is None:
            worst = int(np.nanargmin(measured) if quantity in ("attention_entropy", "angular_distance") else np.nanargmax(measured))
            return f"{_word(quantity)} {measured[worst]:.3g} at {_place(self.points[worst])}"
        if quantity not in LOGARITHMIC:
            worst = int(np.nanargmax(np.abs(measured - planned)))
            return f"furthest from the plan: {measured[worst] - planned[worst]:+.3g} at {_place(self.points[worst])}"
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = np.where(planned > 0, measured / planned, np.nan)
        if np.isnan(ratio).all():
            return "the plan expects no signal here"
        low, high = int(np.nanargmin(ratio)), int(np.nanargmax(ratio))
        return (f"measured/plan {ratio[low]:.3g} ({_place(self.points[low])}) to {ratio[high]:.3g} ({_place(self.points[high])}), median "
                f"{np.nanmedian(ratio):.3g}")

    def _depth_axis(self, axis, line) -> None:
        """Ticks at layers; a thin line where another stack begins."""
        stretches = self._stretches()
        ticks = []
        for begin, end in stretches:
            firsts = [index for index in range(max(1, begin), end)
                      if self.points[index].stack and (self.points[index].layer, self.points[index].stack) !=
                      (self.points[index - 1].layer, self.points[index - 1].stack)]
            step = _round_step(len(firsts) * len(stretches) / 8)
            room = 0.07 * len(self.points) if end < len(self.points) else 0  # to the first tick of the next stack
            ticks += [index for index in firsts if self.points[index].layer % step == 0 and (index + room <= end or index == firsts[0])]
        axis.set_ticks(ticks, labels=[_tick(self.points[index], len(stretches) > 1) for index in ticks])
        for begin, _ in stretches[1:]:
            line(begin - 0.5, color="#555555", linewidth=0.8)

    def _stretches(self) -> list[tuple[int, int]]:
        """Where each stack begins and ends; the embedding lies with the first, the head's input with the last."""
        starts = [index for index in range(2, len(self.points) - 1) if self.points[index].stack != self.points[index - 1].stack]
        return list(zip([0, *starts], [*starts, len(self.points)], strict=True))


def _figure(below: float = 0.22):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.6, 3.7), dpi=130)
    FigureCanvasAgg(figure)
    # Fixed margins: matplotlib's automatic layouts draw everything twice.
    axis = figure.add_axes((0.125, below, 0.855, 0.81 - below))
    axis.tick_params(labelsize=9)
    return figure, axis


def _titles(axis, title: str, found: str, good: str) -> None:
    axis.text(0.0, 1.16, title, transform=axis.transAxes, fontsize=10.5, fontweight="bold")
    axis.text(0.0, 1.09, found, transform=axis.transAxes, fontsize=9)
    axis.text(0.0, 1.02, good, transform=axis.transAxes, fontsize=9, color="#555555")


def _pixels(figure) -> np.ndarray:
    figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba())[..., :3].copy()


def _limit(axis, quantity: str, rows: Sequence[np.ndarray | None]) -> None:
    """A logarithmic axis for what spreads over scales, and never one so narrow that it magnifies noise."""
    values = np.concatenate([row[np.isfinite(row)] for row in rows if row is not None])
    if quantity in LOGARITHMIC:
        positive = values[values > _TINY]
        if len(positive):
            axis.set_yscale("log")
            axis.set_ylim(min(0.5, 0.7 * positive.min()), max(2.0, 1.4 * positive.max()))
            _plain_ticks(axis.yaxis, positive)
    elif quantity == "forward_mean":
        span = max(0.05, 1.2 * float(np.abs(values).max()))
        axis.set_ylim(-span, span)
    else:
        axis.set_ylim(min(0.0, 1.1 * float(values.min())), max(0.05, 1.15 * float(values.max())))


def _plain_ticks(axis, values: np.ndarray) -> None:
    """Over less than two decades: numbers at 0.5, 1, 2 and so on, not powers of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_minor_formatter(NullFormatter())
    if values.max() / values.min() < 100.0:
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _ratio_ticks(largest: float) -> list[float]:
    """Ratios to write beside a colour bar that spans 10 ** -largest to 10 ** largest."""
    if largest >= 1.0:
        return [10.0 ** power for power in range(-int(largest), int(largest) + 1)]
    return [step for step in (0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.4, 2.0, 3.0, 5.0, 10.0) if abs(np.log10(step)) <= largest + 1e-9]


def _round_step(least: float) -> int:
    """The smallest of 1, 2, 4, 8, 10, 20, 25, 50, 100 ... that is at least `least`."""
    steps = (1, 2, 4, 8, 10, 20, 25, 50, 100, 200, 250, 500, 1000, 2000, 5000)
    return next((step for step in steps if step >= least), 10000)


def _tick(point: Point, with_stack: bool) -> str:
    return f"{point.stack[:3]} {point.layer}" if with_stack else str(point.layer)


def _place(point: Point) -> str:
    return f"layer {point.layer}" if point.stack else point.name


def _word(quantity: str) -> str:
    return "smallest" if quantity in ("attention_entropy", "angular_distance") else "largest"


def _finite(values: np.ndarray) -> np.ndarray:
    return np.where(np.isfinite(values), values, np.nan)
