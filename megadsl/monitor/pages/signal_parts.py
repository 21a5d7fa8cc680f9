"""The parts of a page that show a measured signal beside its plan: a table of agreement, the worst points, profiles over depth, maps."""

from collections.abc import Mapping

import numpy as np

from megadsl.monitor.pages.drawings import TEXT, Curve, heat_map, lines
from megadsl.monitor.pages.page import Drawing, Page
from megadsl.monitor.signal import PREDICTED, QUANTITIES, Point, SignalHistory, SignalRecord, predicted
from megadsl.schemes.plan import SignalPlan

# What lies between 0 and 1 is compared by difference: the ratio of two correlations near 0 is noise.
_BY_DIFFERENCE = ("token_correlation", "gradient_correlation")
_LINEAR = (*_BY_DIFFERENCE, "forward_mean", "attention_entropy", "dead_activations", "angular_distance")
_WORST = 4
DEPTH = "point of the stream (0: embedding)"


def agreement_table(page: Page, plan: SignalPlan, records: Mapping[str, SignalRecord]) -> None:
    """A row for each quantity that the plan predicts and each record: smallest, median and largest, and where."""
    rows = []
    for quantity in PREDICTED:
        for label, record in records.items():
            deviation = against_plan(plan, quantity, record)
            if deviation is None or not np.isfinite(deviation).any():
                continue
            names = _names(plan)
            low, high = int(np.nanargmin(deviation)), int(np.nanargmax(deviation))
            how = "measured - plan" if quantity in _BY_DIFFERENCE else "measured / plan"
            rows.append([_words(quantity), label, how, float(deviation[low]), names[low], float(np.nanmedian(deviation)),
                         float(deviation[high]), names[high]])
    page.table(["quantity", "when", "", "smallest", "where", "median", "largest", "where"], rows)


def worst_table(page: Page, plan: SignalPlan, record: SignalRecord, caption: str) -> None:
    """Of the second moment and the gradient variance, the points that are farthest from the plan."""
    names, found = _names(plan), []
    for quantity in PREDICTED:
        if quantity in _BY_DIFFERENCE or (ratio := against_plan(plan, quantity, record)) is None:
            continue
        expected = predicted(plan, quantity)
        far = [(abs(np.log(ratio[index])), index) for index in range(len(ratio)) if np.isfinite(ratio[index]) and ratio[index] > 0]
        found += [[_words(quantity), names[index], float(record.values[quantity][index]), float(expected[index]), float(ratio[index])]
                  for _, index in sorted(far, reverse=True)[:_WORST]]
    page.table(["quantity", "point", "measured", "plan", "measured / plan"], found, caption)


def profiles(plan: SignalPlan | None, records: Mapping[str, SignalRecord]) -> list[Drawing]:
    """A figure for each quantity that was measured: the records' curves over depth, the plan dashed."""
    drawings = []
    for quantity, meaning in QUANTITIES.items():
        curves = {}
        if plan is not None and (expected := predicted(plan, quantity)) is not None:
            curves["plan"] = Curve(np.arange(len(expected)), expected, "dashes", TEXT)
        for index, (label, record) in enumerate(records.items()):
            values = record.values.get(quantity)
            if values is not None and (known := np.isfinite(values)).any():
                curves[label] = Curve(np.flatnonzero(known), values[known], "line" if known.sum() > 1 else "dots", index)
        if any(label != "plan" for label in curves):
            drawings.append(lines(_words(quantity), curves, DEPTH, _words(quantity), False if quantity in _LINEAR else None,
                                  f"{_words(quantity)}: {meaning}"))
    return drawings


def maps(history: SignalHistory) -> list[Drawing]:
    """Depth x iteration, in which a change is seen to start."""
    drawings = []
    for quantity, log in (("forward_second_moment", True), ("gradient_variance", True), ("attention_logit_max", False)):
        values = history.array(quantity).T
        rows = np.isfinite(values).any(axis=1) if values.size else np.zeros(0, bool)
        if rows.any():
            drawings.append(heat_map(f"{_words(quantity)} over the run", values[rows], "iteration", "points, the first at the bottom",
                                     log, x=history.iterations))
    return drawings


def against_plan(plan: SignalPlan, quantity: str, record: SignalRecord) -> np.ndarray | None:
    """Measured over (or minus) predicted, [points]; NaN where the plan expects nothing. None where the two do not go together."""
    expected, values = predicted(plan, quantity), record.values.get(quantity)
    if expected is None or values is None or len(values) != len(expected):
        return None
    if quantity in _BY_DIFFERENCE:
        return values - expected
    return np.divide(values, expected, out=np.full(len(values), np.nan), where=expected > 0)


def _names(plan: SignalPlan) -> list[str]:
    return ["embedding", *(f"{s.stack}.{s.layer}.{s.kind}" for s in plan.sublayers), "final"]


def _words(quantity: str) -> str:
    return quantity.replace("_", " ")


def point_label(point: Point) -> str:
    """A point in words."""
    return point.name if not point.stack else f"{point.stack} layer {point.layer}, {point.kind.replace('_', ' ')}"
