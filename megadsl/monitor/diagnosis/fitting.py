"""Which plan a model's signal is nearest to: the measured profile against every scheme that goes with the model, in logarithms.

A plain transformer that was trained under a scheme has its scalars in its weights (checkpoint/fold.py): with y = x / (product of the
lambdas so far) its stream has the plan's second moment over the product's square, and its gradient variance times it. Where the norm
stands behind the addition the stream has the norm's second moment under every scheme; the gradient alone tells them apart.
"""

import numpy as np

from megadsl.config import Config
from megadsl.errors import UserError
from megadsl.monitor.diagnosis.result import Fit
from megadsl.schemes.plan import SignalPlan
from megadsl.schemes.registry import SCHEMES
from megadsl.tasks.planning import plan_for_comparison


def candidates(config: Config) -> dict[str, SignalPlan]:
    """Plans of all schemes that go with the model of `config`, by name."""
    plans = {}
    for name, scheme in SCHEMES.items():
        if scheme.norm_position in (None, config.model.norm_position):
            try:
                plans[name] = plan_for_comparison(config, name)
            except UserError:
                continue  # a scheme that refuses this model is no candidate
    return plans


def fit_plans(plans: dict[str, SignalPlan], forward: np.ndarray, gradient: np.ndarray) -> list[Fit]:
    """The best first. `forward` and `gradient` are the measured second moment and gradient variance, [points] with the head's input last."""
    fits = []
    for name, plan in plans.items():
        for folded in (False, True) if _has_scalars(plan) else (False,):
            expected, expected_gradient = profile(plan, folded)
            logs = _logs(forward[:-1], expected)
            gradient_logs = _logs(gradient[:-1], expected_gradient)
            fits.append(Fit(name, folded, _rms(logs), _rms(logs - logs.mean()) if logs.size else np.nan, _rms(gradient_logs)))
    return sorted(fits, key=lambda fit: np.nan_to_num(fit.error, nan=np.inf))


def profile(plan: SignalPlan, folded: bool) -> tuple[np.ndarray, np.ndarray]:
    """(second moment, gradient variance) that a plan expects behind the embedding and every addition, [points - 1]."""
    points = (plan.embedding, *plan.sublayers)
    forward, gradient = (np.array([getattr(point, name) for point in points]) for name in ("forward_variance", "gradient_variance"))
    if folded:
        product, squares = {}, [1.0]
        for sublayer in plan.sublayers:
            product[sublayer.stack] = product.get(sublayer.stack, 1.0) * sublayer.residual_scale
            squares.append(product[sublayer.stack] ** 2)
        forward, gradient = forward / squares, gradient * squares
    return forward, gradient


def _has_scalars(plan: SignalPlan) -> bool:
    return plan.norm_position == "pre" and any(sublayer.residual_scale != 1.0 for sublayer in plan.sublayers)


def _logs(measured: np.ndarray, expected: np.ndarray) -> np.ndarray:
    known = np.isfinite(measured) & (measured > 0) & (expected > 0)
    return np.log(measured[known] / expected[known])


def _rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(values)))) if values.size else float("nan")
