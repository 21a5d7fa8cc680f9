"""The measured signal of a run as data: what the probes found at one iteration, by depth, and the plan's numbers beside it.

    RUN/signal.jsonl   a SignalRecord a line, written when it is measured (first line: the points)
    RUN/signal.npz     the same as arrays [iterations, points], written anew at every save and at the end

A point is a place of the residual stream: behind the embedding, behind every residual addition, and the input of the head. Gradient
variance is in units of that at the input of the head, as the plan's. What a point does not have is NaN (null in JSON): only an
attention has logits, only an FFN dead units, only the last addition of a layer an angular distance. numpy only.
"""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from megadsl.data.atomic_files import written_atomically
from megadsl.schemes.plan import SignalPlan

# name -> what it is; in the order in which they are shown.
QUANTITIES = {
    "forward_second_moment": "second moment of the stream, per coordinate",
    "forward_mean": "mean of the stream over positions and coordinates",
    "token_correlation": "mean overlap of two positions over the second moment (1: rank collapse)",
    "gradient_variance": "variance of the gradient at the stream, in units of that at the head's input",
    "gradient_correlation": "mean overlap of two positions' gradients over their variance",
    "attention_logit_variance": "variance of the attention logits over the keys that a query sees, mean over queries and heads",
    "attention_logit_max": "largest attention logit",
    "attention_entropy": "entropy of the attention over the log of the keys seen (1: uniform, 0: one key), mean over queries and heads",
    "dead_activations": "share of the FFN's units that no sampled token activates",
    "angular_distance": "angle between a layer's input and output over pi, mean over tokens (0: the layer changes nothing)",
}
PARAMETER_QUANTITIES = {
    "weight_norm": "norm of a parameter",
    "gradient_norm": "norm of the gradient that the optimizer gets for it (clipped)",
    "update_ratio": "norm of the optimizer's step over that of the parameter",
}
# Which field of a plan's prediction goes with a measured quantity.
PREDICTED = {
    "forward_second_moment": "forward_variance", "token_correlation": "correlation", "gradient_variance": "gradient_variance",
    "gradient_correlation": "gradient_correlation",
}


@dataclass(frozen=True)
class Point:
    """A place of the residual stream. stack and kind are "" for the embedding and the head's input, layer is -1 there."""

    name: str
    stack: str = ""
    layer: int = -1
    kind: str = ""


@dataclass(frozen=True)
class SignalRecord:
    """What was measured at one iteration (counted from 1, as in metrics.jsonl; 0: before the first step).

    Attributes:
        values: by quantity, [points].
        parameters: by parameter quantity, {canonical name of the parameter: number}.
    """

    iteration: int
    values: dict[str, np.ndarray]
    parameters: dict[str, dict[str, float]] = field(default_factory=dict)

    def to_json(self) -> str:
        """One line."""
        return json.dumps({
            "iteration": self.iteration, "values": {name: [_finite(number) for number in row.tolist()] for name, row in self.values.items()},
            "parameters": {name: {key: _finite(number) for key, number in row.items()} for name, row in self.parameters.items()},
        })

    @classmethod
    def from_json(cls, line: str | bytes) -> "SignalRecord":
        """Of a line that to_json wrote; null is NaN."""
        return _record(json.loads(line))


@dataclass
class SignalHistory:
    """All records of a run, oldest first."""

    points: list[Point]
    records: list[SignalRecord] = field(default_factory=list)

    def array(self, quantity: str) -> np.ndarray:
        """[records, points]."""
        missing = np.full(len(self.points), np.nan)
        return np.stack([record.values.get(quantity, missing) for record in self.records]) if self.records else np.empty((0, len(self.points)))

    @property
    def iterations(self) -> list[int]:
        return [record.iteration for record in self.records]

    def save_npz(self, path: Path) -> None:
        """Arrays by quantity, `iterations`, `points` (names), and by parameter quantity [records, parameters] with `parameters`."""
        names = sorted({key for record in self.records for row in record.parameters.values() for key in row})
        arrays = {name: self.array(name) for name in QUANTITIES}
        for quantity in PARAMETER_QUANTITIES:
            arrays[f"parameter_{quantity}"] = np.array(
                [[record.parameters.get(quantity, {}).get(name, np.nan) for name in names] for record in self.records])
        with written_atomically(path) as temporary, open(temporary, "wb") as file:
            np.savez(file, iterations=self.iterations, points=[point.name for point in self.points], parameters=names, **arrays)

    @classmethod
    def read(cls, path: Path) -> "SignalHistory":
        """Of signal.jsonl; a last line that is being written is left out. No file: a history without points."""
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
        rows = [json.loads(line) for line in lines if line.endswith("}\n")]
        if not rows:
            return cls([])
        return cls([Point(**point) for point in rows[0]["points"]], [_record(row) for row in rows[1:]])


def points_header(points: Iterable[Point]) -> str:
    """The first line of signal.jsonl."""
    return json.dumps({"points": [vars(point) for point in points]})


def points_of(plan: SignalPlan) -> list[Point]:
    """All points of a model, in forward order."""
    additions = [Point(f"{s.stack}.{s.layer}.{s.kind}", s.stack, s.layer, s.kind) for s in plan.sublayers]
    return [Point("embedding"), *additions, Point("final")]


def predicted(plan: SignalPlan, quantity: str) -> np.ndarray | None:
    """What the plan says of a quantity, [points]; None where it says nothing."""
    if quantity not in PREDICTED:
        return None
    return np.array([getattr(point, PREDICTED[quantity]) for point in (plan.embedding, *plan.sublayers, plan.final)])


def _record(row: dict) -> SignalRecord:
    def number(value: float | None) -> float:
        return math.nan if value is None else value

    return SignalRecord(
        row["iteration"], {name: np.array([number(value) for value in values]) for name, values in row["values"].items()},
        {name: {key: number(value) for key, value in values.items()} for name, values in row.get("parameters", {}).items()},
    )


def _finite(value: float) -> float | None:
    """Seven digits, which is what fp32 has: a record of 1000 layers holds tens of thousands of numbers."""
    return float(f"{value:.7g}") if math.isfinite(value) else None
