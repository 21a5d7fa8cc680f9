"""Soft-capped attention scores against sampling: weight moments, single branches, whole models; and that what is special about a
cap is needed.

Query and key stds are such that scores have variance 4 without a cap, and caps lie between 1 and 5: what training ends with, not
what a scheme starts from.
"""

import numpy as np
import pytest

from megadsl.cli.theory_cases import model_case
from megadsl.config.model import ModelConfig
from megadsl.theory.attention import AttentionShape, AttentionSignal
from megadsl.theory.check import check_models
from megadsl.theory.contract import component
from megadsl.theory.grid import Gram, Mask, means, uniform_grid
from megadsl.theory.monte_carlo import sample_component
from megadsl.theory.softcap import capped_moments, capped_variance, capped_weights, overlaps, passed_gradient
from megadsl.theory.softmax import exact

WIDTH, LENGTH, KAPPA = 128, 64, 4.0
STD = KAPPA ** 0.25 * WIDTH ** -0.5
BRANCH = {"length": LENGTH, "in_features": WIDTH, "num_heads": 4, "query_std": STD, "key_std": STD}


def sampled_weights(variance: float, share: float, cap: float, rows: int = 20_000, keys: int = 40) -> tuple[np.ndarray, np.ndarray]:
    """(weights p, slopes f') of rows of capped scores, [rows, keys]."""
    random = np.random.default_rng(0)
    scores = np.sqrt(variance) * (np.sqrt(share) * random.standard_normal((rows, 1))
                                  + np.sqrt(1.0 - share) * random.standard_normal((rows, keys)))
    weights = np.exp(cap * np.tanh(scores / cap))
    return weights / weights.sum(1, keepdims=True), 1.0 - np.tanh(scores / cap) ** 2


@pytest.mark.parametrize("cap", [1.0, 2.0, 5.0, 50.0])
@pytest.mark.parametrize("share", [0.0, 0.5])
def test_weight_moments(cap, share):
    p, slope = sampled_weights(KAPPA, share, cap)
    squares = (p ** 2).sum(1)
    mean_slope = (p * slope).sum(1, keepdims=True)
    samples = [
        squares, (p ** 3).sum(1), squares ** 2, (slope ** 2 * p ** 2 * (1.0 - 2.0 * p + squares[:, None])).sum(1), mean_slope[:, 0],
        (p ** 2 * (slope - mean_slope) ** 2).sum(1),
    ]
    found = capped_moments(np.array([40.0]), KAPPA, share, cap)[:, 0]
    for index, (expected, sample) in enumerate(zip(found, samples, strict=True)):
        # leak takes the mean of what other keys give to p . f' for itself; it counts beside s_passed.
        tolerance = 0.05 * samples[3].mean() if index == 5 else 0.01 * sample.mean()
        assert abs(expected - sample.mean()) < tolerance + 4.5 * sample.std() / np.sqrt(len(sample)), index


@pytest.mark.parametrize("cap", [1.0, 3.0, 50.0])
def test_overlaps_of_two_scores(cap):
    random = np.random.default_rng(1)
    first, other = random.standard_normal((2, 400_000))
    for r in (0.0, 0.3, 0.8, 1.0):
        both = [cap * np.tanh(np.sqrt(KAPPA) * u / cap) for u in (first, r * first + np.sqrt(1.0 - r * r) * other)]
        assert overlaps(KAPPA, cap).capped(r) == pytest.approx(np.mean(both[0] * both[1]), rel=0.02, abs=0.02)
        slopes = [1.0 - (one / cap) ** 2 for one in both]
        assert overlaps(KAPPA, cap).slopes(r) == pytest.approx(np.mean(slopes[0] * slopes[1]), rel=0.02)
    assert capped_variance(KAPPA, 1e4) == pytest.approx(KAPPA, rel=1e-3) and passed_gradient(KAPPA, 1e4) == pytest.approx(1.0, rel=1e-3)
    assert capped_variance(1e6, cap) == pytest.approx(cap ** 2, rel=0.05)


def test_a_cap_that_nothing_reaches_changes_nothing():
    for name in ("attention", "cross_attention"):
        case = {**BRANCH, "correlation": 0.4, "gradient_correlation": 0.2, "mask": "causal"}
        free, capped = component(name, **case), component(name, **case, attention_softcap=1e3)
        for quantity in ("second_moment", "covariance", "gradient_second_moment", "gradient_covariance"):
            assert getattr(capped, quantity) == pytest.approx(getattr(free, quantity), rel=5e-3, abs=1e-9), quantity


@pytest.mark.parametrize("variance", [0.02, 0.7, 3.9])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.875])
def test_tables_read_the_integrals(variance, share):
    n = np.array([1.0, 2.0, 7.0, 60.0])
    direct = capped_weights(n, np.full(4, variance), np.full(4, share), 1.5, 0.05, None)
    read = capped_weights(n, np.full(4, variance), np.full(4, share), 1.5, 0.05, 4.0)
    for name in ("p2", "s", "tilt", "slope", "leak"):
        assert getattr(read, name) == pytest.approx(getattr(direct, name), rel=0.02, abs=2e-3), name


@pytest.mark.parametrize("mask", ["causal", "bidirectional"])
@pytest.mark.parametrize("r", [0.0, 0.5])
@pytest.mark.parametrize("cap", [1.0, 2.0, 5.0])
def test_attention_agrees_with_sampling(mask, r, cap):
    case = {**BRANCH, "mask": mask, "correlation": r, "gradient_correlation": 0.1, "attention_softcap": cap}
    measured, predicted = sample_component("attention", 80, 5, **case), component("attention", **case)
    for quantity, bound in (("second_moment", 0.05), ("covariance", 0.05), ("gradient_second_moment", 0.07), ("gradient_covariance", 0.07)):
        expected, spread = measured.value[quantity], measured.standard_error[quantity]
        assert abs(getattr(predicted, quantity) - expected) < max(bound * abs(expected), 4.0 * spread), quantity


def query_gradient(r: float, cap: float, **changed) -> float:
    """Second moment of the gradient at the queries' input of cross-attention, per that of the output; `changed`: what of
    AttentionSignal is put out of work."""
    grid = uniform_grid(LENGTH)
    inputs = Gram(np.full((1, 1), r), np.ones(1))
    shape = AttentionShape(WIDTH, WIDTH // 4, softcap=cap)
    signal = AttentionSignal(shape, Mask(grid, grid, False), KAPPA, inputs, inputs)
    for name, value in changed.items():
        setattr(signal, name, value)
    return means(grid, signal.backward(Gram(np.zeros((1, 1)), np.ones(1)))[0])[0]


@pytest.mark.parametrize("r", [0.2, 0.6])
@pytest.mark.parametrize("cap", [1.0, 2.0])
def test_the_gradient_at_queries_needs_the_loss_in_the_cap_and_its_leak(r, cap):
    measured = sample_component("cross_attention", 120, 6, **BRANCH, correlation=r, attention_softcap=cap)
    value, spread = measured.value["gradient_second_moment"], 4.0 * measured.standard_error["gradient_second_moment"]
    assert abs(query_gradient(r, cap) - value) < max(0.12 * value, spread)
    assert abs(query_gradient(r, cap, passed=1.0) - value) > max(0.3 * value, spread), "the gradient goes through f'"
    if r == 0.6:
        assert query_gradient(r, cap, leak=0.0) < value - max(0.1 * value, 0.5 * spread), "keys have much in common"
    assert query_gradient(r, 1e3) > 1.5 * value, "what a model without the cap would have"


def test_a_gaussian_of_the_capped_variance_is_not_enough():
    """Capped scores have no tails: weights are flatter than those of Gaussian scores of the same variance."""
    p, _ = sampled_weights(KAPPA, 0.0, 1.0)
    measured, gaussian = (p ** 2).sum(1).mean(), 40.0 * exact(40, capped_variance(KAPPA, 1.0))
    assert capped_moments(np.array([40.0]), KAPPA, 0.0, 1.0)[0, 0] == pytest.approx(measured, rel=0.01)
    assert gaussian > 1.1 * measured


@pytest.mark.parametrize("model", [
    {"family": "decoder"}, {"family": "encoder"}, {"family": "decoder", "norm_position": "post"}, {"family": "decoder", "qk_layernorm": True},
], ids=lambda model: "-".join(map(str, model.values())))
def test_whole_models_under_a_cap(model):
    """A cap of 0.5 on the scores of variance 1 that DSLM starts with: half of their variance is gone."""
    shape = ModelConfig(num_layers=8, hidden_size=128, num_attention_heads=4, seq_length=64, attention_logit_softcap=0.5, **model)
    for row in check_models([model_case("dslm", shape, 14)], 1, note=lambda text: None):
        error, spread = np.array(row["error"]), np.array(row["standard_error"])
        assert np.percentile(error - np.maximum(0.10, 3.0 * spread), 90) < 0.0, (row["quantity"], error.max(), spread.max())
