"""Figures of depth profiles. matplotlib (Agg) is imported when a figure is drawn, so that `import megadsl.theory` stays quick."""

from collections.abc import Mapping, Sequence
from pathlib import Path

COLOURS = ("#1b6ca8", "#c8553d", "#588157", "#8d5a97", "#b8860b", "#444444", "#17a2a2", "#d6338a", "#7a9a01", "#6b4226",
           "#8898aa")
# Curves that lie on each other (all schemes that start as the identity) stay visible through the gaps of later ones.
FIRST, *LATER = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)))
PANELS = (
    ("forward_variance", "forward variance", True),
    ("correlation", "token correlation", False),
    ("gradient_variance", "gradient variance", True),
)


def depth_figure(curves: Mapping[str, Sequence], path: Path | str, measured: Mapping[str, Sequence] | None = None,
                 title: str = "", linear: bool = False) -> None:
    """Three panels over depth: forward variance, token correlation, gradient variance.

    `curves`: name -> predictions (any objects with these attributes) after the embedding and after every sublayer. `measured`:
    the same from a Monte-Carlo run, drawn as points in the colour of the curve. `linear`: no logarithmic axes.
    """
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(1, 3, figsize=(13.5, 4.2), constrained_layout=True)
    for axis, (attribute, label, logarithmic) in zip(axes, PANELS, strict=True):
        for index, (name, points) in enumerate(curves.items()):
            _curve(axis, [getattr(point, attribute) for point in points], COLOURS[index % len(COLOURS)], name,
                   [getattr(point, attribute) for point in measured[name]] if measured and name in measured else None,
                   LATER[(index - 1) % len(LATER)] if index else FIRST)
        axis.set_title(label, fontsize=11)
        _decorate(axis)
        _scale(axis, logarithmic, linear)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 8), frameon=False, fontsize=10,
                  handlelength=3.0)
    _finish(pyplot, figure, path, title)


def three_panels(path: Path | str, curves: Sequence[tuple[Sequence[float], Sequence[float]]], titles: Sequence[str],
        title: str) -> None:
    """Predicted and sampled values over depth, one pair a panel, logarithmic."""
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(1, len(curves), figsize=(13.5, 4.0), constrained_layout=True)
    for axis, (predicted, sampled), label in zip(axes, curves, titles, strict=True):
        _curve(axis, predicted, COLOURS[0], "predicted", sampled)
        axis.set_title(label, fontsize=11)
        axis.set_yscale("log")
        _decorate(axis)
    _finish(pyplot, figure, path, title)


def line_figure(path: Path | str, x: Sequence[float], values: Sequence[Sequence[float]], titles: Sequence[str], label: str,
        title: str) -> None:
    """One panel for each row of `values` over a logarithmic x."""
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(1, len(values), figsize=(13.5, 4.0), constrained_layout=True)
    for axis, row, name in zip(axes, values, titles, strict=True):
        axis.plot(x, row, "o-", color=COLOURS[0], markersize=3.5)
        axis.set_xscale("log", base=2)
        axis.set_title(name, fontsize=11)
        _decorate(axis, label)
        if max(row) > 20.0 * min(row):
            axis.set_yscale("log")
        else:
            axis.set_ylim(bottom=0.0)
    _finish(pyplot, figure, path, title)


def phase_figure(path: Path | str, dropouts: Sequence[float], weights: Sequence[float], grids: Mapping[str, Sequence]) -> None:
    """Token correlation at the top over dropout and k."""
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(1, len(grids), figsize=(11.0, 4.4), constrained_layout=True)
    for axis, (name, grid) in zip(axes, grids.items(), strict=True):
        image = axis.pcolormesh(weights, dropouts, grid, vmin=0.0, vmax=1.0, cmap="viridis", shading="gouraud")
        lines = axis.contour(weights, dropouts, grid, levels=[0.2, 0.4, 0.6, 0.8, 0.9], colors="white", linewidths=1.0)
        axis.clabel(lines, fmt="%.1f", fontsize=9)
        axis.axvline(2.0, color="white", linestyle=":", linewidth=1.2)
        axis.set_xscale("log", base=2)
        axis.set_xlabel("k (total weight of the branches; dotted: the default)")
        axis.set_ylabel("hidden dropout")
        axis.set_title(name, fontsize=11)
    figure.colorbar(image, ax=axes, label="token correlation at the top")
    _finish(pyplot, figure, path, "Token correlation of DSLM at initialisation, 48 layers (any depth gives the same)")


def error_figure(rows: Sequence[Mapping], path: Path | str) -> None:
    """Percentiles of relative error (bars 50/90/99) and of the standard error of the measurement (ticks), by component and
    quantity."""
    pyplot = _pyplot()
    labels = [f"{row['name']}  {row['quantity']}" for row in rows]
    figure, axis = pyplot.subplots(figsize=(9.0, 1.0 + 0.19 * len(rows)), constrained_layout=True)
    for index, shade in ((2, 0.35), (1, 0.6), (0, 1.0)):
        axis.barh(range(len(rows)), [100 * row["error"][index] for row in rows], color=COLOURS[0], alpha=shade,
                  label=f"error, {(50, 90, 99)[index]}th percentile")
    axis.plot([100 * row["standard_error"][1] for row in rows], range(len(rows)), "|", color=COLOURS[1], markersize=7,
              label="standard error of the sampling, 90th percentile")
    axis.set_yticks(range(len(rows)), labels, fontsize=7)
    axis.invert_yaxis()
    axis.set_xlabel("percent")
    axis.legend(frameon=False, fontsize=8)
    axis.grid(alpha=0.25, axis="x")
    _finish(pyplot, figure, path, "")


def _pyplot():
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _curve(axis, values: Sequence[float], colour: str, name: str, sampled: Sequence[float] | None, style=FIRST) -> None:
    axis.plot(range(len(values)), values, color=colour, linewidth=1.8, label=name, linestyle=style)
    if sampled is not None:
        # At most 40 markers: more of them hide the curve.
        step = max(1, len(sampled) // 40)
        axis.plot(range(0, len(sampled), step), sampled[::step], "o", color=colour, markersize=3.5, alpha=0.7)


def _decorate(axis, label: str = "sublayer (0: embedding)") -> None:
    axis.set_xlabel(label)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)


def _finish(pyplot, figure, path: Path | str, title: str) -> None:
    if title:
        figure.suptitle(title, fontsize=12)
    figure.savefig(path, dpi=140)
    pyplot.close(figure)


def _scale(axis, logarithmic: bool, linear: bool) -> None:
    """Correlations span [0, 1]; variances get a logarithmic axis where they spread, else one that does not magnify noise."""
    if not logarithmic:
        axis.set_ylim(0.0, 1.0)
        return
    values = [value for line in axis.get_lines() for value in line.get_ydata() if value > 0]
    if not linear and max(values) / min(values) > 4.0:
        axis.set_yscale("log")
    else:
        axis.set_ylim(0.0, 1.15 * max(*values, 1.0))
