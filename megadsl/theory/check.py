"""`megadsl theory check`: random grids of components and given models, sampled and compared with the formulas.

An error is |predicted / measured - 1|; where a covariance is less than a tenth of its second moment, its error is taken relative
to that tenth, because a relative error of something that is nearly zero says nothing. The standard error of the measurement
stands beside it in the same unit. Torch is imported when a check runs.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megadsl.theory.contract import NAMES, component
from megadsl.theory.profile import DepthProfile
from megadsl.theory.shape import Embedding, ModelShape

PERCENTILES = (50, 90, 99)
FLOOR = 0.1
FORWARD = ("second_moment", "covariance")
BACKWARD = ("gradient_second_moment", "gradient_covariance")
MEMORY = ("memory_gradient_second_moment", "memory_gradient_covariance")


@dataclass(frozen=True)
class ModelCase:
    """One model to sample: its prediction and what it was made of."""

    label: str
    shape: ModelShape
    embedding: Embedding
    profile: DepthProfile
    vocab_size: int
    draws: int
    sequences: int = 2


def component_cases(name: str, count: int, seed: int, largest: int = 1000) -> list[dict]:
    """Random settings: widths and lengths 100..largest, correlations 0..0.9, score variance up to 1, weights away from their
    defaults."""
    random = np.random.default_rng([seed, NAMES.index(name)])

    def log_uniform(low: float, high: float) -> float:
        return float(np.exp(random.uniform(np.log(low), np.log(high))))

    cases = []
    for _ in range(count):
        case = {
            "mean": float(random.choice([0.0, random.uniform(-1.0, 1.0)])), "variance": log_uniform(0.3, 3.0),
            "correlation": float(random.choice([0.0, random.uniform(0.0, 0.9)])), "gradient_variance": log_uniform(0.3, 3.0),
            "gradient_correlation": float(random.choice([0.0, random.uniform(0.0, 0.9)])),
        }
        if name in ("linear", "ffn", "layernorm", "rmsnorm", "attention", "cross_attention"):
            case["in_features"] = int(log_uniform(100, largest))
        if name == "softmax":
            case |= {"mean": 0.0, "variance": log_uniform(0.05, 1.0), "length": int(log_uniform(100, largest))}
        if name == "dropout":
            case["dropout"] = float(random.uniform(0.0, 0.5))
        if name == "linear":
            case |= {"out_features": int(log_uniform(100, largest)), "weight_std": log_uniform(0.01, 1.0)}
        if name == "ffn":
            case |= {"activation": str(random.choice(["relu", "gelu", "silu", "swiglu", "geglu"])),
                "dropout": float(random.choice([0, 0.1])),
                     "fc1_std": case["in_features"] ** -0.5 * log_uniform(0.5, 2.0)}
        if name in ("attention", "cross_attention"):
            case |= _attention_case(case, random, log_uniform, largest, name == "cross_attention")
        cases.append(case)
    return cases


def _attention_case(case: dict, random: np.random.Generator, log_uniform: Callable, largest: int, cross: bool) -> dict:
    heads = int(random.choice([1, 2, 4, 8]))
    width = max(100, case["in_features"] // heads * heads)
    second = case["mean"] ** 2 + case["variance"]
    # Scores of variance up to 1: kappa q s^2 (1 - r) <= 1.
    kappa = log_uniform(0.05, 1.0) / (second * case["variance"] * (1.0 - case["correlation"]))
    std = kappa ** 0.25 / np.sqrt(width)
    drawn = {
        "in_features": width, "num_heads": heads, "head_dim": int(random.choice([16, 32, 64, 128])),
        "num_query_groups": int(random.choice([g for g in (1, 2, 4, 8) if heads % g == 0])),
        "length": int(log_uniform(100, largest)),
        "query_std": std, "key_std": std, "attention_dropout": float(random.choice([0.0, 0.1, 0.2])),
        "output_projection": bool(random.choice([True, False])),
    }
    if cross:
        r = float(random.uniform(0.0, 0.9))
        return {**drawn, "memory_length": int(log_uniform(100, largest)), "memory_correlation": r,
                "query_std": std * ((1.0 - case["correlation"]) / (1.0 - r)) ** 0.25,
                "key_std": std * ((1.0 - case["correlation"]) / (1.0 - r)) ** 0.25}
    return {**drawn, "mask": str(random.choice(["bidirectional", "causal"]))}


def check_components(count: int, draws: int, seed: int, names: Sequence[str] = NAMES, largest: int = 1000,
        note: Callable = print) -> list[dict]:
    """One row for every case and quantity: name, quantity, setting, measured, predicted, error, standard_error."""
    from megadsl.theory.monte_carlo import sample_component

    rows = []
    for name in names:
        heavy = name in ("attention", "cross_attention", "ffn", "linear")
        settings = component_cases(name, count, seed, largest)
        for index, case in enumerate(settings):
            measured = sample_component(name, draws if heavy else 20 * draws, seed + index, **case)
            predicted = component(name, **case)
            rows += _compare(name, case, measured, predicted)
        note(f"{name}: {len(settings)} settings")
    return rows


def _compare(name: str, case: dict, measured, predicted) -> list[dict]:
    rows = []
    for quantity in (*FORWARD, *BACKWARD, *MEMORY):
        if quantity not in measured.value:
            continue
        value = measured.value[quantity]
        expected = predicted.extra[quantity] if quantity in MEMORY else getattr(predicted, quantity)
        second = measured.value[quantity.replace("covariance", "second_moment")]
        # The softmax's covariance is of order 1/n beside its second moment by nature.
        scale = max(abs(value), (FLOOR if name != "softmax" else 0.0) * second)
        rows.append({"name": name, "quantity": quantity, "setting": case, "measured": value, "predicted": expected,
                     "error": abs(expected - value) / scale, "standard_error": measured.standard_error[quantity] / scale})
    return rows


def check_models(cases: Sequence[ModelCase], seed: int, note: Callable = print) -> list[dict]:
    """One row for every case and quantity: arrays over depth of measured, predicted, error and standard error."""
    from megadsl.theory.monte_carlo import sample_model

    rows = []
    for case in cases:
        # The sampler's gradient has no part along the state, which the last norm would take away.
        variance, correlation = case.profile.entering
        measured = sample_model(case.shape, case.embedding, case.profile.sublayers, case.vocab_size, correlation, case.draws,
                                seed, case.sequences)
        points = np.array([point.values() for point in measured.points])
        expected = np.array([point.values() for point in (case.profile.embedding, *case.profile.predictions)])
        expected[:, 2] /= variance
        errors = measured.standard_errors
        post = case.shape.outer_norm
        for column, quantity in enumerate(("forward_variance", "correlation", "gradient_variance", "gradient_correlation")):
            value, wanted, spread = points[:, column], expected[:, column], errors[:, column]
            if quantity.endswith("correlation"):
                spread = spread / np.abs(value)
            if quantity == "gradient_variance" and post:
                # Heavy-tailed: the typical gradient, compared in logarithms.
                value = np.exp(measured.log_gradient)
                error = np.abs(np.log(wanted / value))
            else:
                error = np.abs(wanted - value) / np.abs(value)
            rows.append({"name": case.label, "quantity": quantity, "measured": value.tolist(), "predicted": wanted.tolist(),
                         "error": error.tolist(), "standard_error": spread.tolist()})
        low, high = points[:, 0].min(), points[:, 0].max()
        note(f"{case.label}: {case.draws} draws, measured forward variance {low:.3f} to {high:.3f} "
             f"(s.e. up to {errors[:, 0].max():.3f})")
    return rows


def summary(rows: list[dict]) -> list[dict]:
    """Percentiles of the errors and of the standard errors by name and quantity; a `*` row pools all forward or backward
    errors."""
    groups: dict[tuple[str, str], list] = {}
    for row in rows:
        pooled = "backward" if "gradient" in row["quantity"] else "forward"
        for key in ((row["name"], row["quantity"]), (row["name"], f"all {pooled}")):
            groups.setdefault(key, []).append((np.atleast_1d(row["error"]), np.atleast_1d(row["standard_error"])))
    table = []
    for (name, quantity), parts in groups.items():
        error, spread = (np.concatenate(part) for part in zip(*parts, strict=True))
        table.append({"name": name, "quantity": quantity, "count": len(error),
                      "error": [float(x) for x in np.percentile(error, PERCENTILES)],
                      "standard_error": [float(x) for x in np.percentile(spread, PERCENTILES)]})
    return table


def table(rows: list[dict]) -> str:
    """The summary as text: percent error 50/90/99 and, beside it, the standard error of the measurement."""
    lines = [f"{'':34s} {'quantity':28s} {'n':>5s}   error % 50/90/99     s.e. % 50/90/99"]
    for row in summary(rows):
        error, spread = (" ".join(f"{100 * x:5.1f}" for x in row[key]) for key in ("error", "standard_error"))
        lines.append(f"{row['name']:34s} {row['quantity']:28s} {row['count']:5d}   {error}    {spread}")
    return "\n".join(lines)


def progress_note(text: str) -> None:
    """A line on stderr, so that stdout stays the result."""
    print(text, file=sys.stderr, flush=True)


def figure(rows: list[dict], path: Path) -> None:
    """Errors of all components beside the standard error of their measurement."""
    from megadsl.theory.figures import error_figure

    error_figure([row for row in summary(rows) if not row["quantity"].startswith("all")], path)
