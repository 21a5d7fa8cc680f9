"""A record of the signal as a few scalars: measured over plan, and the layer that is worst in each respect."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from megadsl.monitor.compare import extremes
from megadsl.monitor.signal import SignalRecord, points_of, predicted
from megadsl.schemes.plan import SignalPlan

_RATIOS = {"forward_ratio": "forward_second_moment", "gradient_ratio": "gradient_variance"}
# Correlations begin near 0, where a ratio says nothing: their largest distance from the plan.
_DIFFERENCES = {"token_correlation_difference": "token_correlation", "gradient_correlation_difference": "gradient_correlation"}
_LARGEST = ("token_correlation", "attention_logit_max", "attention_logit_variance", "dead_activations")
_SMALLEST = ("attention_entropy", "angular_distance")


@dataclass(frozen=True)
class SignalScalar:
    """One number of a record, and the point or parameter that it was found at ("" for a median)."""

    name: str
    value: float
    where: str = ""


def signal_scalars(plan: SignalPlan, record: SignalRecord) -> list[SignalScalar]:
    """All that is finite; names as in TensorBoard."""
    found = [*_against_plan(plan, record), *_worst(plan, record), *_of_parameters(record)]
    return [scalar for scalar in found if np.isfinite(scalar.value)]


def where_text(iteration: int, scalars: list[SignalScalar]) -> str:
    """The scalars that lie somewhere, as a Markdown table."""
    rows = [f"| {scalar.name} | {scalar.value:.4g} | {scalar.where} |" for scalar in scalars if scalar.where]
    return "\n".join([f"Iteration {iteration}", "", "| | value | where |", "|---|---|---|", *rows])


def _against_plan(plan: SignalPlan, record: SignalRecord) -> Iterator[SignalScalar]:
    for name, quantity in _RATIOS.items():
        if found := extremes(plan, record, quantity):
            low, lowest, median, high, highest = found
            yield SignalScalar(f"signal/{name}_min", low, lowest.name)
            yield SignalScalar(f"signal/{name}_median", median)
            yield SignalScalar(f"signal/{name}_max", high, highest.name)
    points = points_of(plan)
    for name, quantity in _DIFFERENCES.items():
        expected = predicted(plan, quantity)
        if expected is not None and quantity in record.values:
            difference = record.values[quantity] - expected
            if (worst := _largest(np.abs(difference))) is not None:
                yield SignalScalar(f"signal/{name}_max", float(difference[worst]), points[worst].name)


def _worst(plan: SignalPlan, record: SignalRecord) -> Iterator[SignalScalar]:
    points = points_of(plan)
    for quantity in (*_LARGEST, *_SMALLEST):
        if quantity not in record.values:
            continue
        sign = 1.0 if quantity in _LARGEST else -1.0
        if (worst := _largest(sign * record.values[quantity])) is not None:
            name = quantity if quantity.endswith("_max") else f"{quantity}_{'max' if sign > 0 else 'min'}"
            yield SignalScalar(f"signal/{name}", float(record.values[quantity][worst]), points[worst].name)
    gradient = record.values.get("gradient_variance")
    if gradient is not None and gradient[-1]:
        yield SignalScalar("signal/gradient_first_over_last", float(gradient[0] / gradient[-1]))


def _of_parameters(record: SignalRecord) -> Iterator[SignalScalar]:
    for quantity, row in record.parameters.items():
        finite = {name: value for name, value in row.items() if np.isfinite(value)}
        if not finite:
            continue
        low, high = min(finite, key=finite.__getitem__), max(finite, key=finite.__getitem__)
        yield SignalScalar(f"weights/{quantity}_min", finite[low], low)
        yield SignalScalar(f"weights/{quantity}_median", float(np.median([*finite.values()])))
        yield SignalScalar(f"weights/{quantity}_max", finite[high], high)


def _largest(values: np.ndarray) -> int | None:
    """Index of the largest number; None where there is none."""
    return None if np.isnan(values).all() else int(np.nanargmax(values))
