"""Measured over planned: ratios by depth, and what they say in a line."""

from collections.abc import Iterator

import numpy as np

from megadsl.monitor.signal import Point, SignalRecord, points_of, predicted
from megadsl.schemes.plan import SignalPlan

_SHOWN = {"forward_second_moment": "forward variance", "token_correlation": "token correlation", "gradient_variance": "gradient variance"}


def ratios(plan: SignalPlan, record: SignalRecord, quantity: str) -> np.ndarray:
    """Measured over planned, [points]; NaN where one of them is missing or the plan says 0."""
    expected = predicted(plan, quantity)
    if expected is None or quantity not in record.values:
        return np.full(len(points_of(plan)), np.nan)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(expected != 0, record.values[quantity] / expected, np.nan)


def extremes(plan: SignalPlan, record: SignalRecord, quantity: str) -> tuple[float, Point, float, float, Point] | None:
    """(smallest ratio, where, median, largest, where); None where nothing is measured."""
    found, points = ratios(plan, record, quantity), points_of(plan)
    if np.isnan(found).all():
        return None
    low, high = int(np.nanargmin(found)), int(np.nanargmax(found))
    return float(found[low]), points[low], float(np.nanmedian(found)), float(found[high]), points[high]


def agreement(plan: SignalPlan, record: SignalRecord) -> Iterator[str]:
    """A line for each quantity that is planned: measured over planned at one iteration."""
    for quantity, words in _SHOWN.items():
        if found := extremes(plan, record, quantity):
            low, lowest, median, high, highest = found
            yield (f"signal at iteration {record.iteration} | {words}, measured/plan: {low:.3f} ({lowest.name}) to {high:.3f} "
                   f"({highest.name}), median {median:.3f}")
