"""What `megadsl diagnose` finds, as data. numpy only."""

import json
import math
from dataclasses import asdict, dataclass, field

import numpy as np

from megadsl.monitor.signal import Point, SignalRecord


@dataclass(frozen=True)
class Skip:
    """Layers first ... first + count - 1 of a stack left out: by how much the loss rises (below 0: it falls)."""

    stack: str
    first: int
    count: int
    loss_increase: float = math.nan


@dataclass(frozen=True)
class Fit:
    """How far the measured profile is from a scheme's plan: root mean square of ln(measured / plan) over the points of the stream.

    Attributes:
        folded: the plan as a plain transformer has it, its scalars multiplied into the weights.
        forward_error: of the second moment, with its scale; `shape_error`: with the best common factor taken out.
        gradient_error: of the gradient variance.
    """

    scheme: str
    folded: bool
    forward_error: float
    shape_error: float
    gradient_error: float

    @property
    def name(self) -> str:
        return f"{self.scheme}, folded" if self.folded else self.scheme

    @property
    def error(self) -> float:
        """What plans are ranked by: root mean square over both moments."""
        return math.hypot(self.forward_error, self.gradient_error) / math.sqrt(2.0)


@dataclass(frozen=True)
class Outlier:
    """A coordinate of the stream that is far above the others: its largest |activation| over the root mean square of the stream there."""

    point: str
    coordinate: int
    ratio: float


@dataclass
class Diagnosis:
    """Everything about one model on some data.

    Attributes:
        facts: what the model is, by name.
        loss: on the samples, all layers in place.
        signal: values by quantity (signal.QUANTITIES), [points].
        heads: "logit_variance", "logit_max" and "entropy" -> {name of the addition: [heads]}.
        outliers: the largest coordinates, at most one entry a coordinate; outlier_ratio: the largest ratio of every point, [points].
        skips: single layers, then windows of layers.
        fits: the best first.
        nearest: what the best fit expects, "forward_second_moment" and "gradient_variance", [points - 1] (without the head's input).
    """

    facts: dict[str, object]
    points: list[Point]
    signal: SignalRecord
    loss: float
    heads: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    outlier_ratio: list[float] = field(default_factory=list)
    outliers: list[Outlier] = field(default_factory=list)
    skips: list[Skip] = field(default_factory=list)
    fits: list[Fit] = field(default_factory=list)
    nearest: dict[str, list[float]] = field(default_factory=dict)

    @property
    def effective_depth(self) -> float:
        """As many layers that turn the stream equally far would do what these do: (sum of angles)^2 / sum of squared angles."""
        angles = self.signal.values["angular_distance"]
        angles = angles[np.isfinite(angles)]
        squares = float((angles ** 2).sum())
        return float(angles.sum()) ** 2 / squares if squares else 0.0

    def to_json(self, indent: int | None = None) -> str:
        """One object; what is not finite is null."""
        values = {
            "facts": self.facts, "points": [asdict(point) for point in self.points],
            "signal": {name: row.tolist() for name, row in self.signal.values.items()}, "loss": self.loss, "heads": self.heads,
            "effective_depth": self.effective_depth, "outlier_ratio": self.outlier_ratio,
            "outliers": [asdict(one) for one in self.outliers], "skips": [asdict(one) for one in self.skips],
            "fits": [asdict(one) | {"error": one.error} for one in self.fits], "nearest": self.nearest,
        }
        return json.dumps(_finite(values), indent=indent)


def _finite(value):
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
