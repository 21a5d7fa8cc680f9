"""Figures of pages, drawn by matplotlib and given as SVG that stands in the page itself: lines over depth or over the run, maps, bars.

Text and axes take the colour of the page's text, so that a figure is readable in the dark. Ids carry a zero byte that the page
replaces by the figure's number.
"""

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from megadsl.monitor.pages.page import Drawing
from megadsl.theory.figures import COLOURS

_INK = "#123456"  # replaced by the colour of the page's text
_SIZE = (5.4, 3.2)
_MOST_POINTS = 600
TEXT = -1


@dataclass(frozen=True)
class Curve:
    """y over x. `style`: line; dots; dashes (what is predicted). `colour`: a number, or TEXT for that of the page's text."""

    x: Sequence[float]
    y: Sequence[float]
    style: str = "line"
    colour: int = 0


def lines(name: str, curves: Mapping[str, Curve], xlabel: str, ylabel: str = "", log: bool | None = None, caption: str = "",
          log_x: bool = False) -> Drawing:
    """Curves in one panel. `log` None: a logarithmic axis where the values spread over more than a decade."""
    from matplotlib.ticker import EngFormatter

    figure, axis = _axes()
    for label, curve in curves.items():
        x, y = _thinned(np.asarray(curve.x, float), np.asarray(curve.y, float))
        look = {"line": {"linewidth": 1.5}, "dots": {"linestyle": "", "marker": "o", "markersize": 2.8, "alpha": 0.8},
                "dashes": {"linewidth": 1.3, "linestyle": (0, (4, 2))}}[curve.style]
        if curve.style == "line" and np.isfinite(y).sum() == 1:
            look = {"linestyle": "", "marker": "o", "markersize": 4.0}  # a single value has no line
        axis.plot(x, y, color=COLOURS[curve.colour % len(COLOURS)] if curve.colour >= 0 else _INK, label=_plain(label), **look)
    values = [np.asarray(curve.y, float) for curve in curves.values()]
    _scale(axis, np.concatenate([array[np.isfinite(array)] for array in values]) if values else np.empty(0), log)
    if log_x:
        axis.set_xscale("log")
    elif max((max(curve.x, default=0.0) for curve in curves.values()), default=0.0) >= 1e4:
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    axis.set_xlabel(_plain(xlabel))
    axis.set_ylabel(_plain(ylabel))
    if len(curves) > 1:
        figure.legend(loc="outside lower center", ncols=min(len(curves), 3), frameon=False, fontsize=8, labelcolor=_INK)
    return Drawing(_svg(figure), name, caption or name)


def bars(name: str, x: Sequence[float], values: Sequence[float], xlabel: str, ylabel: str, caption: str = "", width: float = 0.8) -> Drawing:
    """One bar for each x."""
    figure, axis = _axes()
    axis.bar(x, values, width=width, color=COLOURS[0])
    axis.axhline(0.0, color=_INK, linewidth=0.6)
    axis.set_xlabel(_plain(xlabel))
    axis.set_ylabel(_plain(ylabel))
    return Drawing(_svg(figure), name, caption or name)


def heat_map(name: str, values: np.ndarray, xlabel: str, ylabel: str, log: bool = False, caption: str = "",
             x: Sequence[float] | None = None) -> Drawing:
    """values [rows, columns], the first row at the bottom; what is not finite stays empty. `x`: of the columns."""
    from matplotlib.colors import LogNorm
    from matplotlib.ticker import MaxNLocator

    figure, axis = _axes()
    shown = np.ma.masked_invalid(np.asarray(values, float))
    if log:
        shown = np.ma.masked_less_equal(shown, 0.0)
    norm = LogNorm() if log and shown.count() and shown.max() > shown.min() else None
    image = axis.imshow(shown, aspect="auto", origin="lower", cmap="viridis", norm=norm, interpolation="nearest")
    if x is not None:
        places = np.unique(np.linspace(0, len(x) - 1, min(6, len(x))).round().astype(int))
        axis.set_xticks(places, [f"{x[place]:g}" for place in places])
    axis.yaxis.set_major_locator(MaxNLocator(integer=True))
    colours = figure.colorbar(image, ax=axis)
    colours.ax.tick_params(colors=_INK, which="both", labelsize=8)
    colours.outline.set_visible(False)
    axis.grid(visible=False)
    axis.set_xlabel(_plain(xlabel))
    axis.set_ylabel(_plain(ylabel))
    return Drawing(_svg(figure), name, caption or name)


def _axes():
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=_SIZE, layout="constrained")
    figure.patch.set_alpha(0.0)
    axis.patch.set_alpha(0.0)
    axis.tick_params(colors=_INK, which="both", labelsize=8)
    axis.xaxis.label.set_color(_INK)
    axis.yaxis.label.set_color(_INK)
    axis.xaxis.label.set_size(9)
    axis.yaxis.label.set_size(9)
    axis.grid(alpha=0.25, color=_INK, linewidth=0.5)
    axis.spines[["top", "right"]].set_visible(False)
    for spine in axis.spines.values():
        spine.set_color(_INK)
    return figure, axis


def _plain(text: str) -> str:
    """Text that matplotlib takes as it is: no formula between dollars, and no name that a legend leaves out."""
    return (" " if text.startswith("_") else "") + text.replace("$", r"\$")


def _scale(axis, values: np.ndarray, log: bool | None) -> None:
    positive = values[values > 0]
    if log is None:
        log = positive.size > 0 and positive.size == values.size and positive.max() / positive.min() > 10.0
    if log and positive.size:
        axis.set_yscale("log")
    elif values.size and values.min() >= 0 and (values.max() - values.min()) <= 0.2 * values.max():
        axis.set_ylim(0.0, 1.15 * values.max() or 1.0)  # an axis that does not magnify noise
    # One far value must not press all others flat: the axis is then cut.
    if not log and values.size > 20 and math.isfinite(values.max()):
        low, high = np.quantile(values, (0.01, 0.99))
        if values.max() - high > 4.0 * (high - low) > 0:
            axis.set_ylim(top=high + 1.0 * (high - low))


def _thinned(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Means over neighbours where there are more points than can be seen; what is not finite in a group is left out of its mean."""
    if len(x) <= _MOST_POINTS:
        return x, y
    groups = np.array_split(np.arange(len(x)), _MOST_POINTS)
    finite = [group[np.isfinite(y[group])] for group in groups]
    return np.array([x[group].mean() for group in groups]), np.array([y[group].mean() if len(group) else math.nan for group in finite])


def _svg(figure) -> str:
    from matplotlib import pyplot, rc_context

    text = io.StringIO()
    # Names are not links: without metadata there is no address in the file. The salt makes the same figure the same text.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "megadsl"}):
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    pyplot.close(figure)
    svg = text.getvalue()
    svg = svg[svg.index("<svg "):]
    svg = re.sub(r'\sxmlns(:xlink)?="[^"]*"', "", svg)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = re.sub(r'(<svg [^>]*?)\swidth="[^"]*"', r"\1", re.sub(r'(<svg [^>]*?)\sheight="[^"]*"', r"\1", svg, count=1), count=1)
    svg = re.sub(r'\bid="', 'id="\0', svg)
    svg = svg.replace("url(#", "url(#\0").replace('href="#', 'href="#\0')
    return svg.replace(_INK, "currentColor").strip()
