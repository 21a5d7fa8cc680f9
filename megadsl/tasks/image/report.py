"""The results of an image classifier as text and figures. matplotlib is imported when a figure is drawn."""

from pathlib import Path

import numpy as np

_SHADES = ("#08306b", "#2171b5", "#6baed6", "#fdae6b", "#d94801")


def describe(results: dict) -> str:
    """A line, and a table of accuracy by corruption and severity where there is one."""
    line = ("accuracy {top1_accuracy:.4f} (top-5 {top5_accuracy:.4f}) | loss {loss:.4f} nats per image | calibration error "
            "{calibration_error:.4f} | {samples:,} images").format(**results)
    rows = results.get("corruptions")
    if not rows:
        return line
    severities = sorted({severity for row in rows.values() for severity in row})
    width = max(map(len, rows))
    table = [f"{'accuracy at severity':<{max(width, 20)}}" + "".join(f"{severity:>8}" for severity in severities) + "    mean"]
    for name, row in rows.items():
        cells = "".join(f"{row[severity]:8.4f}" if severity in row else f"{'':8}" for severity in severities)
        table.append(f"{name:<{max(width, 20)}}{cells}{sum(row.values()) / len(row):8.4f}")
    drop = "" if results["relative_drop"] is None else f", {results['relative_drop']:.1%} below that of clean images"
    return "\n".join([line, *table, f"mean over corruptions and severities {results['corrupted_accuracy']:.4f}{drop}"])


def write_figures(folder: Path, confusion: np.ndarray, bins: np.ndarray, classes: tuple[str, ...], results: dict) -> None:
    """confusion.png, calibration.png and, where there are some, corruptions.png."""
    import matplotlib
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(5.6, 5.0), layout="constrained")
        _confusion(figure.subplots(), confusion, classes)
        figure.savefig(folder / "confusion.png", dpi=130)
        figure = Figure(figsize=(4.4, 4.0), layout="constrained")
        _calibration(figure.subplots(), bins, results["calibration_error"])
        figure.savefig(folder / "calibration.png", dpi=130)
        if results.get("corruptions"):
            figure = Figure(figsize=(9.5, 4.0), layout="constrained")
            _corruptions(figure.subplots(), results)
            figure.savefig(folder / "corruptions.png", dpi=130)


def _confusion(axes, confusion: np.ndarray, classes: tuple[str, ...]) -> None:
    shares = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1.0)
    axes.imshow(shares, cmap="Blues", vmin=0.0, vmax=1.0)
    if len(classes) <= 20:
        axes.set_xticks(range(len(classes)), classes, rotation=60, ha="right")
        axes.set_yticks(range(len(classes)), classes)
        for row, column in zip(*np.nonzero(shares >= 0.005), strict=True):
            colour = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, f"{100 * shares[row, column]:.0f}", ha="center", va="center", fontsize=7, color=colour)
    axes.set(xlabel="answer", ylabel="label", title="answers in % of the images of a class")


def _calibration(axes, bins: np.ndarray, error: float) -> None:
    filled = bins[:, 0] > 0
    count, confidence, right = bins[filled].T
    axes.plot([0, 1], [0, 1], color="0.6", linewidth=1)
    axes.scatter(confidence / count, right / count, s=4 + 300 * count / count.sum(), color=_SHADES[1])
    axes.set(xlabel="mean confidence of a bin", ylabel="accuracy", xlim=(0, 1.03), ylim=(0, 1.03),
             title=f"calibration, expected error {error:.3f} (area: images)")


def _corruptions(axes, results: dict) -> None:
    rows = results["corruptions"]
    severities = sorted({severity for row in rows.values() for severity in row})
    bar = 0.8 / len(severities)
    for number, severity in enumerate(severities):
        places = [place + bar * (number + 0.5) - 0.4 for place, row in enumerate(rows.values()) if severity in row]
        axes.bar(places, [row[severity] for row in rows.values() if severity in row], bar, color=_SHADES[number % len(_SHADES)],
                 label=f"severity {severity}")
    axes.axhline(results["top1_accuracy"], color="0.3", linewidth=1, linestyle=(0, (5, 2)), label="clean")
    axes.axhline(results["corrupted_accuracy"], color="0.3", linewidth=1, linestyle=(0, (1, 1.5)), label="mean, corrupted")
    axes.set_xticks(range(len(rows)), [name.replace("_", " ") for name in rows], rotation=40, ha="right")
    axes.set(ylabel="accuracy", ylim=(0, 1))
    axes.legend(frameon=False, ncols=7, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0))
