"""Alarms over what every step gives: loss and gradient norm. One line an alarm: what, where, since when, how much, what helps.

An alarm is raised once per episode, which ends when the number has clearly come back (docs/alarms.md says how far). Whether one is
raised is a pure function of the numbers that were recorded, so a resumed run raises what an undisturbed one does: `state` is what
a checkpoint keeps. signal_alarms.py does the same for what the probes measure. No torch.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from megadsl.config.alarms import AlarmsConfig

# What usually helps, by alarm; keys of the configuration where there are any.
ADVICE = {
    "loss_spike": "lower optimizer.lr or lengthen optimizer.lr_warmup_iters; a single bad batch: monitor.alarms.loss_spike.action=skip",
    "gradient_norm_spike": "optimizer.clip_grad=1.0, a lower optimizer.lr; a single bad batch: monitor.alarms.gradient_norm_spike.action=skip",
    "divergence": "lower optimizer.lr, or lengthen optimizer.lr_warmup_iters; start anew from a checkpoint from before it",
    "variance_drift": "lower optimizer.lr, more optimizer.weight_decay; at step 0: weights or statistics are not those of the plan (megadsl plan)",
    "gradient_ratio": "a scheme that holds the gradient at every depth (scheme=dslm); megadsl plan shows the ratio beforehand",
    "entropy_collapse": "normalise queries and keys (model.qk_layernorm=true), lower optimizer.lr",
    "logit_growth": "normalise queries and keys (model.qk_layernorm=true), lower optimizer.lr, more optimizer.weight_decay",
    "dead_activations": "lower optimizer.lr, or a smooth unit (model.activation=gelu or swiglu)",
    "unused_layers": "a larger share of the branches (scheme.k), or fewer layers; megadsl plan shows what each layer adds",
    "update_ratio": "too large: lower optimizer.lr; too small: lower optimizer.adam_eps, or look whether the parameter gets a gradient",
}
SEVERITY = ("off", "warn", "skip", "rollback", "stop")
# Part of the way from the usual to the limit at which an episode ends.
RELEASE = 0.7
_NORMAL_QUANTILE_90 = 1.2816
_MAD_TO_DEVIATION = 1.4826


@dataclass(frozen=True)
class Reading:
    """One look at one alarm's number.

    Attributes:
        excess: how far the number is on its way to the limit; from 1 on it is beyond.
        where: the point of the model, or "" for the run as a whole.
        text: the number and its limit in words.
        measured: the number itself.
    """

    excess: float
    where: str
    text: str
    measured: float


@dataclass(frozen=True)
class Alarm:
    """A number beyond its limit.

    Attributes:
        iteration: at which it was found beyond.
        since: since when it has been near or beyond.
        fine: when it was last looked at and not beyond.
    """

    name: str
    iteration: int
    since: int
    fine: int
    where: str
    measured: float
    action: str
    text: str

    def line(self) -> str:
        """For the log and TensorBoard."""
        place = f" at {self.where}" if self.where else ""
        return (f"alarm {self.name} | iteration {self.iteration}{place} | {self.text} | since iteration {self.since} | "
                f"action {self.action} | usually helps: {ADVICE[self.name]}")

    def record(self) -> dict:
        """For alarms.jsonl."""
        return {**asdict(self), "measured": self.measured if math.isfinite(self.measured) else None, "helps": ADVICE[self.name]}


class Episodes:
    """Which alarms are raised now, and since when each number has been on its way out."""

    def __init__(self, actions: dict[str, str], state: dict[str, list] | None = None):
        self.actions = actions
        self._state = {name: (int(since), bool(raised)) for name, (since, raised) in (state or {}).items()}
        self._fine: dict[str, int] = {}

    def update(self, name: str, iteration: int, reading: Reading | None) -> Alarm | None:
        """The alarm, where this reading begins an episode. None as a reading: nothing to judge, nothing changes."""
        if reading is None or self.actions[name] == "off":
            return None
        since, raised = self._state.get(name, (iteration, False))
        if reading.excess < 1.0:
            self._fine[name] = iteration
            if reading.excess < RELEASE:
                self._state.pop(name, None)
            else:
                self._state[name] = since, raised
            return None
        self._state[name] = since, True
        if raised:
            return None
        return Alarm(name, iteration, since, self._fine.get(name, iteration - 1), reading.where, reading.measured, self.actions[name], reading.text)

    def state(self) -> dict[str, list]:
        return {name: [since, raised] for name, (since, raised) in self._state.items()}


class SpikeWindow:
    """The last numbers of a curve, and how far a new one sticks out upwards.

    A robust z-score: the distance to the median of the last 16 over the spread about the window's trend, which is the largest of the
    spread by the median absolute deviation, that by the 90 % quantile (a skewed curve is no spike) and `floor`, below which nothing
    matters. Numbers beyond stay in the window: a few of them change little, and a curve that stays up becomes the usual.
    """

    _RECENT = 16

    def __init__(self, size: int, min_values: int, values: Sequence[float] = ()):
        self._size, self._min, self.values = size, min_values, [*values][-size:]

    def add(self, value: float) -> None:
        if math.isfinite(value):
            self.values = [*self.values, value][-self._size:]

    def score(self, value: float, floor: float) -> float:
        """Robust deviations above the median; 0 while the window holds too little."""
        if len(self.values) < self._min or not math.isfinite(value):
            return 0.0
        held = np.array(self.values)
        half = len(held) // 2
        slope = (np.median(held[-half:]) - np.median(held[:half])) / (len(held) - half)
        about = held - slope * np.arange(len(held))
        median = np.median(about)
        spread = max(_MAD_TO_DEVIATION * np.median(np.abs(about - median)), (np.quantile(about, 0.9) - median) / _NORMAL_QUANTILE_90, floor)
        return float((value - self.median()) / spread)

    def median(self) -> float:
        """The level of late."""
        return float(np.median(self.values[-self._RECENT:]))


class StepAlarms:
    """The alarms of every step. `state` of a checkpoint goes in where a run resumes; {}: a fresh run."""

    _LOSS_FLOOR = 0.01       # of the median loss
    _LOG_NORM_FLOOR = 0.1    # 10 % of the norm
    _DIVERGENCE_STEPS = 8

    def __init__(self, options: AlarmsConfig, state: dict):
        self._options = options
        self._losses = SpikeWindow(options.window, options.min_steps, state.get("losses", ()))
        self._log_norms = SpikeWindow(options.window, options.min_steps, state.get("log_gradient_norms", ()))
        self._episodes = Episodes(options.actions, state.get("episodes"))

    def state(self) -> dict:
        """What a checkpoint keeps: the windows and the episodes, some hundred numbers."""
        return {"losses": self._losses.values, "log_gradient_norms": self._log_norms.values, "episodes": self._episodes.state()}

    def refuses(self, loss: float, gradient_norm: float) -> str:
        """The alarm whose action is to skip the step with this loss and gradient norm; "": none. Changes nothing."""
        readings = {"loss_spike": self._loss_spike(loss), "gradient_norm_spike": self._gradient_norm_spike(gradient_norm)}
        return next((name for name, reading in readings.items()
                     if self._episodes.actions[name] == "skip" and reading is not None and reading.excess >= 1.0), "")

    def observe(self, iteration: int, loss: float, gradient_norm: float, first_loss: float | None, refused: bool = False) -> list[Alarm]:
        """The alarms that the step raises. A loss or norm that is not finite is not judged: such a step is skipped anyway.

        Args:
            first_loss: of the run's first finite step.
            refused: whether the step was left out; its numbers are judged, and not kept: they are none that the run came through.
        """
        spike, norm_spike = self._loss_spike(loss), self._gradient_norm_spike(gradient_norm)
        if not refused:
            self._losses.add(loss)
            self._log_norms.add(_log(gradient_norm))
        readings = {"loss_spike": spike, "gradient_norm_spike": norm_spike, "divergence": self._divergence(first_loss)}
        raised = (self._episodes.update(name, iteration, reading) for name, reading in readings.items())
        return [alarm for alarm in raised if alarm]

    def _loss_spike(self, loss: float) -> Reading | None:
        if not self._losses.values:
            return None
        median, limit = self._losses.median(), self._options.loss_spike.threshold
        score = self._losses.score(loss, self._LOSS_FLOOR * abs(median))
        words = f"loss {loss:.4g} is {score:.1f} robust deviations above the median {median:.4g} of late (limit {limit:g})"
        return Reading(score / limit, "", words, loss)

    def _gradient_norm_spike(self, norm: float) -> Reading | None:
        if not self._log_norms.values:
            return None
        limit = self._options.gradient_norm_spike.threshold
        score = self._log_norms.score(_log(norm), self._LOG_NORM_FLOOR)
        words = (f"gradient norm {norm:.4g} is {score:.1f} robust deviations of its logarithm above the median "
                 f"{math.exp(self._log_norms.median()):.4g} of late (limit {limit:g})")
        return Reading(score / limit, "", words, norm)

    def _divergence(self, first_loss: float | None) -> Reading | None:
        recent = self._losses.values[-self._DIVERGENCE_STEPS:]
        if first_loss is None or first_loss <= 0 or len(recent) < self._DIVERGENCE_STEPS:
            return None
        limit, median = self._options.divergence.threshold, float(np.median(recent))
        # On its way from the loss of the first step (0) to the limit (1).
        excess = (median / first_loss - 1.0) / (limit - 1.0)
        words = f"median loss {median:.4g} of the last {self._DIVERGENCE_STEPS} steps is above {limit:g} x the first step's {first_loss:.4g}"
        return Reading(excess, "", words, median)


def severest(alarms: Sequence[Alarm]) -> Alarm | None:
    """The alarm whose action goes furthest."""
    return max(alarms, key=lambda alarm: SEVERITY.index(alarm.action), default=None)


def _log(norm: float) -> float:
    return math.log(norm) if 0 < norm < math.inf else math.nan
