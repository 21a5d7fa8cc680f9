"""Alarms over what the probes measure (signal.py): a function each, from one record and what was measured before to a Reading.

Weights move and branches grow while a model learns, so a trained model is compared with its own step 0 and only step 0 with the
plan; limits that hold for any model (entropy, logits, dead units) are absolute. numpy only.
"""

from collections.abc import Callable, Iterable

import numpy as np

from megadsl.config.alarms import AlarmsConfig, GradientRatioConfig, UnusedLayersConfig, UpdateRatioConfig, VarianceDriftConfig
from megadsl.monitor.alarms import RELEASE, Alarm, Episodes, Reading
from megadsl.monitor.signal import Point, SignalRecord, predicted
from megadsl.schemes.plan import SignalPlan

_DRIFTING, _GRADIENT, _ANGLE = "forward_second_moment", "gradient_variance", "angular_distance"


class SignalAlarms:
    """The alarms of every measured iteration. On resuming, `observe` the records up to there again and drop what they raise.

    Args:
        drawn: whether the run began from weights that were drawn from the plan (not from another run's).
    """

    def __init__(self, options: AlarmsConfig, plan: SignalPlan, points: list[Point], drawn: bool = True):
        self._options, self._points, self._drawn = options, points, drawn
        self._plan = predicted(plan, _DRIFTING)
        gates = {(sublayer.stack, sublayer.layer) for sublayer in plan.sublayers if sublayer.gate != "fixed"}
        # Layers with a trained gate begin unused (ReZero, LayerScale): they are judged once they have been in use.
        self._judged = np.array([(point.stack, point.layer) not in gates for point in points])
        self._first: np.ndarray | None = None
        self._episodes = Episodes(options.actions)

    def observe(self, record: SignalRecord) -> list[Alarm]:
        """The alarms that a record raises; records come in the order of their iterations."""
        options, now = self._options, record.values
        if self._first is None and _DRIFTING in now:
            self._first = now[_DRIFTING]
        readings = {
            "variance_drift": self._variance_drift(record, options.variance_drift),
            "gradient_ratio": self._gradient_ratio(record, options.gradient_ratio),
            "entropy_collapse": self._worst(
                now.get("attention_entropy"), options.entropy_collapse.threshold, _below, "attention entropy {:.3g} of 1"),
            "logit_growth": self._worst(now.get("attention_logit_max"), options.logit_growth.threshold, _above, "largest logit {:.4g}"),
            "dead_activations": self._worst(now.get("dead_activations"), options.dead_activations.threshold, _above, "{:.1%} dead units"),
            "unused_layers": self._unused_layers(now.get(_ANGLE), options.unused_layers),
            "update_ratio": self._update_ratio(record, options.update_ratio),
        }
        raised = (self._episodes.update(name, record.iteration, reading) for name, reading in readings.items())
        return [alarm for alarm in raised if alarm]

    def replay(self, records: Iterable[SignalRecord]) -> None:
        """What a run before this process has seen: nothing of it is raised again."""
        for record in records:
            self.observe(record)

    def _variance_drift(self, record: SignalRecord, options: VarianceDriftConfig) -> Reading | None:
        measured = record.values.get(_DRIFTING)
        if measured is None:
            return None
        if record.iteration == 0 and self._drawn:
            return self._worst(_ratio(measured, self._plan), options.plan_factor, _either, "second moment {:.3g} x the plan's")
        # A stream that begins small (an embedding of 0.02) grows to order 1 as a model learns: that is no drift.
        reference = np.where(measured > self._first, np.maximum(self._first, 1.0), self._first)
        grown = np.where((measured > self._first) & (measured < reference), 1.0, _ratio(measured, reference))
        return self._worst(grown, options.threshold, _either, "second moment {:.3g} x that of the first measurement (or 1)")

    def _gradient_ratio(self, record: SignalRecord, options: GradientRatioConfig) -> Reading | None:
        gradient = record.values.get(_GRADIENT)
        if gradient is None:
            return None
        limit = options.at_start if record.iteration == 0 and self._drawn else options.threshold
        found = []
        for stack in dict.fromkeys(point.stack for point in self._points if point.stack):
            places = [i for i, point in enumerate(self._points) if point.stack == stack and gradient[i] > 0 and np.isfinite(gradient[i])]
            if not places:
                continue
            high, low = (places[pick(gradient[places])] for pick in (np.argmax, np.argmin))
            ratio = float(gradient[high] / gradient[low])
            words = f"gradient variance {ratio:.4g} times that at {self._points[low].name} (limit {limit:g})"
            found.append(Reading(_above(np.log(ratio), np.log(limit)), self._points[high].name, words, ratio))
        return max(found, key=lambda reading: reading.excess, default=None)

    def _unused_layers(self, angle: np.ndarray | None, options: UnusedLayersConfig) -> Reading | None:
        if angle is None:
            return None
        self._judged |= angle * RELEASE > options.threshold  # NaN compares as False
        return self._worst(np.where(self._judged, angle, np.nan), options.threshold, _under, "angle between input and output {:.2g} of pi")

    def _update_ratio(self, record: SignalRecord, options: UpdateRatioConfig) -> Reading | None:
        ratios = {name: ratio for name, ratio in record.parameters.get("update_ratio", {}).items() if np.isfinite(ratio)}
        if not ratios:
            return None
        high, low, median = max(ratios, key=ratios.get), min(ratios, key=ratios.get), float(np.median([*ratios.values()]))
        above = _above(ratios[high], options.largest)
        # The median is 0 where the schedule has come to its end: all stand still.
        below = options.smallest * median / ratios[low] if ratios[low] else (2.0 if median and options.smallest else 0.0)
        if above >= below:
            return Reading(above, high, f"a step changes {ratios[high]:.3g} of the weights (limit {options.largest:g})", ratios[high])
        words = f"a step changes {ratios[low]:.2g} of the weights, {options.smallest:g} of the median {median:.2g} or less"
        return Reading(below, low, words, ratios[low])

    def _worst(self, values: np.ndarray | None, limit: float, excess_of: Callable[[np.ndarray, float], np.ndarray],
               words: str) -> Reading | None:
        """The point that is furthest on its way to the limit; None where no point has a value."""
        if values is None or not np.isfinite(values).any():
            return None
        with np.errstate(divide="ignore"):
            excess = np.where(np.isfinite(values), excess_of(values, limit), -np.inf)
        worst, beyond = int(excess.argmax()), int((excess >= 1.0).sum())
        others = f"; {beyond} of {int(np.isfinite(values).sum())} points beyond" if beyond > 1 else ""
        text = f"{words.format(float(values[worst]))} (limit {limit:g}{others})"
        return Reading(float(excess[worst]), self._points[worst].name, text, float(values[worst]))


def _above(values: np.ndarray, limit: float) -> np.ndarray:
    return values / limit


def _under(values: np.ndarray, limit: float) -> np.ndarray:
    return limit / values


def _below(values: np.ndarray, limit: float) -> np.ndarray:
    """On the way from 1 to a limit below it, by orders of magnitude."""
    return np.log(values) / np.log(limit)


def _either(ratios: np.ndarray, limit: float) -> np.ndarray:
    """Away from 1 in either direction, by orders of magnitude."""
    return np.abs(np.log(ratios)) / np.log(limit)


def _ratio(measured: np.ndarray, reference: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        return measured / reference
