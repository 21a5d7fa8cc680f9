"""Soft-capped attention scores: f(s) = c tanh(s / c) of Gaussian scores, and the moments of attention weights behind it.

A query's scores s ~ N(0, V) correlate by g between its keys (the part of the keys that all share, which a softmax alone would
ignore), and by rho between two queries at one key. With u, v standard normal of correlation r and f_V(u) = f(sqrt(V) u),
    R(r) = E f_V(u) f_V(v) = sum_k a_k^2 r^k,  R'(r) = E f'(.) f'(.) = sum_k b_k^2 r^k       a, b Hermite coefficients
so that capped scores have the variance R(1) - R(g) that matters to a softmax, and two queries' scores the correlation
(R(rho) - R(rho g)) / (R(1) - R(g)).

Weights: given the shared part m ~ N(0, g V) scores are independent, and every moment is an integral over t as in softmax.py with
f(m + s) in place of a, averaged over m. Behind the softmax the gradient passes through f': with C = diag(p) - p p^T,
    s_passed = E sum_s f'_s^2 (C^2)_ss            gradient through one key, which was E tr C^2
    slope    = E p . f'                           how far the weights follow a score
    leak     = E |C f'|^2 = E sum_s p_s^2 (f'_s - p . f')^2       a shift of all scores is not ignored any more; of p . f' all that
               the other keys give is taken to be its mean: f'_s - p . f' = (1 - p_s)(f'_s - slope)
Derived here; checked in tests/signal/test_formulas_scores.py.

Letters: n keys, V score variance, c cap, g share of the score variance that keys have in common.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from megadsl.errors import UserError
from megadsl.theory.softmax import LARGEST_VARIANCE, AttentionWeights, fluctuation_nodes, joint_shape

_DEGREE = 64
_SHARES = 8
_FIELDS = 9


def capped_variance(variance: float, cap: float) -> float:
    """E f(s)^2 for s ~ N(0, variance)."""
    return overlaps(variance, cap).capped(1.0)


def passed_gradient(variance: float, cap: float) -> float:
    """E f'(s)^2 = E sech^4(s / c): the share of a gradient's variance that the cap lets through."""
    return overlaps(variance, cap).slopes(1.0)


@dataclass(frozen=True)
class Overlaps:
    """R and R' of the module docstring for one V and c, as squared Hermite coefficients by degree."""

    value: np.ndarray
    slope: np.ndarray

    def capped(self, correlation):
        return np.polynomial.polynomial.polyval(correlation, self.value)

    def slopes(self, correlation):
        return np.polynomial.polynomial.polyval(correlation, self.slope)


@lru_cache(maxsize=1)
def _hermite() -> tuple[np.ndarray, np.ndarray]:
    """(nodes z, normalised Hermite polynomials times the weights of a Gaussian mean [degree + 1, z])."""
    z = np.linspace(-9.0, 9.0, 1441)
    weight = np.exp(-0.5 * z * z) * (z[1] - z[0]) / math.sqrt(2.0 * math.pi)
    # h_{k+1} = (z h_k - sqrt(k) h_{k-1}) / sqrt(k+1).
    previous, current, basis = np.zeros_like(z), np.ones_like(z), []
    for k in range(_DEGREE + 1):
        basis.append(current)
        previous, current = current, (z * current - math.sqrt(k) * previous) / math.sqrt(k + 1.0)
    return z, np.stack(basis) * weight


@lru_cache(maxsize=256)
def overlaps(variance: float, cap: float) -> Overlaps:
    """Overlaps of scores of one variance under one cap."""
    z, basis = _hermite()
    tanh = np.tanh(math.sqrt(variance) * z / cap)
    found = []
    for function in (cap * tanh, 1.0 - tanh ** 2):
        squares = (basis @ function) ** 2
        # What higher degrees hold belongs to r near 1, where only their sum counts.
        squares[-1] += max(float(basis[0] @ function ** 2) - squares.sum(), 0.0)
        found.append(squares)
    return Overlaps(*found)


def _given_shared(n: np.ndarray, own: float, shared: float, cap: float) -> np.ndarray:
    """[E Q_2, E Q_3, E Q_2^2, s_passed, slope, leak] for independent scores f(shared + N(0, own))."""
    root = math.sqrt(own)
    # The same grids as in softmax.py, as far as scores below the cap reach; finer where tanh bends within one step.
    reach = 8.0 + 4.0 * min(root, cap)
    z = np.linspace(-8.0, reach, max(96, int((8.0 + reach) * max(1.0, root, root / cap) / 0.2)))
    tanh = np.tanh((shared + root * z) / cap)
    a, slope = cap * tanh, 1.0 - tanh ** 2
    largest, least = min(a.max(), 0.5 * own + 3.0 * root + shared), max(a.min(), shared - 7.0 * root)
    low, high = -math.log(n.max()) - largest - 9.0, 4.0 - least
    log_t = np.linspace(low, high, max(120, int((high - low) / 0.16)))
    t, step = np.exp(log_t), log_t[1] - log_t[0]
    kernel = np.exp(-np.exp(np.clip(log_t[:, None] + a, None, 6.55)))
    mass = np.exp(-0.5 * z * z).sum()

    def moment(k: int, factor: np.ndarray | float = 1.0) -> np.ndarray:
        return kernel @ (np.exp(k * a - 0.5 * z * z) * factor / mass)

    m2 = moment(2)
    log_m0 = np.log(np.maximum(moment(0), 1e-300))
    rest, rest2 = np.exp(np.outer(n - 1.0, log_m0)), np.exp(np.outer(np.maximum(n - 2.0, 0.0), log_m0))

    def single(k: int, values: np.ndarray) -> np.ndarray:
        return n * (rest @ (t ** k / math.factorial(k - 1) * values)) * step

    def pair(values: np.ndarray) -> np.ndarray:
        return n * (n - 1.0) * (rest2 @ (t ** 4 / 6.0 * values)) * step

    def own_variance(factor: np.ndarray | float) -> np.ndarray:
        """E sum_s p_s^2 (1 - p_s)^2 factor_s."""
        return single(2, moment(2, factor)) - 2.0 * single(3, moment(3, factor)) + single(4, moment(4, factor))

    follows, squares = single(1, moment(1, slope)), own_variance(slope ** 2)
    return np.maximum([
        single(2, m2), single(3, moment(3)), single(4, moment(4)) + pair(m2 ** 2), squares + pair(moment(2, slope ** 2) * m2), follows,
        squares - 2.0 * follows * own_variance(slope) + follows ** 2 * own_variance(1.0),
    ], 0.0)


def capped_moments(n: np.ndarray, variance: float, share: float, cap: float) -> np.ndarray:
    """[E Q_2, E Q_3, E Q_2^2, s_passed, slope, leak] for rows of n keys, averaged over the part of the scores that keys share."""
    if capped_variance(round(variance, 9), cap) > LARGEST_VARIANCE:
        raise UserError(f"Attention scores of variance {variance:.4g} are beyond the theory under a cap of {cap:g}, too; make "
                        "query_std or key_std smaller, or the cap.")
    own, shared = variance * max(1.0 - share, 0.0), variance * min(max(share, 0.0), 1.0)
    nodes, weights = (np.zeros(1), np.ones(1)) if shared < 1e-9 else np.polynomial.hermite_e.hermegauss(5)
    total = np.zeros((6, len(n)))
    for node, weight in zip(nodes, weights / weights.sum(), strict=True):
        total += weight * _given_shared(n, max(own, 1e-9), math.sqrt(shared) * node, cap)
    return total


def _averaged(n: np.ndarray, variance: float, share: float, cap: float, omega: float) -> np.ndarray:
    """The fields of CappedWeights, averaged over the fluctuation of the score variance: [9, len(n)]."""
    total = np.zeros((_FIELDS, len(n)))
    for x, weight in zip(*fluctuation_nodes(omega), strict=True):
        q2, q3, q22, passed, slope, leak = capped_moments(n, variance * x, share, cap)
        s = np.maximum(q2 - 2.0 * q3 + q22, 0.0)
        total += weight * np.stack([q2, s, x * s, 1.0 - q2 - 6.0 * q3 + 6.0 * q22, 1.0 - 2.0 * q2 + q22, np.zeros_like(n),
                                    np.where(s > 1e-6, np.minimum(passed / np.maximum(s, 1e-6), 1.0), 1.0), slope, leak])
    found = overlaps(round(variance, 9), cap)
    total[5] = joint_shape(n, float(found.capped(1.0) - found.capped(share)), capped_moments(n, variance, share, cap)[0])
    return total


@dataclass(frozen=True)
class CappedWeights(AttentionWeights):
    """AttentionWeights of capped scores, and what the gradient loses in the cap, one entry a row.

    passed: s_passed / s. slope: E p . f'. leak: E |C f'|^2.
    """

    passed: np.ndarray
    slope: np.ndarray
    leak: np.ndarray


def capped_weights(n: np.ndarray, variance: np.ndarray, share: np.ndarray, cap: float, omega: float,
                   table_limit: float | None) -> CappedWeights:
    """Rows of n keys with score variances and shares of it that keys have in common.

    `table_limit`: None computes the last row's variance and share for all (exchangeable inputs); a number reads all rows from tables
    up to that variance, one for each of nine shares, linearly between them.
    """
    if table_limit is None:
        return CappedWeights(*_averaged(n, float(variance[-1]), float(share[-1]), cap, omega))
    rounded = 2.0 ** math.ceil(math.log2(max(table_limit, 0.25)))
    place = np.clip(share, 0.0, 1.0) * _SHARES
    total = np.zeros((_FIELDS, len(n)))
    for index in range(_SHARES + 1):
        weight = np.maximum(1.0 - np.abs(place - index), 0.0)
        if weight.any():
            table = _table(tuple(n), rounded, index / _SHARES, cap, round(omega, 6))
            total += weight * table.read(variance)
    return CappedWeights(*total)


class _Table:
    """The fields for one share at any variance in [0, largest]: Chebyshev through nodes, then linear on a fine grid."""

    _FINE = 256

    def __init__(self, n: np.ndarray, largest: float, share: float, cap: float, omega: float):
        degree = 10 if largest <= 1.0 else 14 if largest <= 4.0 else 24
        nodes = 0.5 * (1.0 - np.cos(np.pi * (np.arange(degree) + 0.5) / degree))
        # Beyond its cap a score changes with the logarithm of its standard deviation: nodes are denser at small variances.
        values = np.stack([_averaged(n, largest * max(node, 1e-6) ** 2, share, cap, omega) for node in nodes])
        fine = np.linspace(0.0, 1.0, self._FINE + 1)
        fit = np.polynomial.chebyshev.chebvander(2.0 * nodes - 1.0, degree - 1)
        read = np.polynomial.chebyshev.chebvander(2.0 * fine - 1.0, degree - 1)
        resampled = read @ np.linalg.solve(fit, values.reshape(degree, -1))
        self._values = resampled.reshape(self._FINE + 1, _FIELDS, len(n))
        self._largest, self._rows = largest, np.arange(len(n))

    def read(self, variance: np.ndarray) -> np.ndarray:
        """[9, rows] at one variance a row."""
        place = np.clip(np.sqrt(variance / self._largest), 0.0, 1.0 - 1e-9) * self._FINE
        index = place.astype(np.intp)
        low, high = (self._values[index + step, :, self._rows] for step in (0, 1))
        return np.maximum(low + (place - index)[:, None] * (high - low), 0.0).T


@lru_cache(maxsize=64)
def _table(n: tuple[float, ...], largest: float, share: float, cap: float, omega: float) -> _Table:
    return _Table(np.array(n), largest, share, cap, omega)
