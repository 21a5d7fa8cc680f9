"""Softmax over n scores: the moments of attention weights, in closed forms of different range and exactly.

Scores a_j ~ N(0, s^2) with pairwise correlation r: a common shift cancels, so only v = (1-r) s^2 matters, and scores are taken as
independent N(0, v) below. Weights p_j = e^{a_j} / sum_i e^{a_i}.

Exact: 1/Z^k = int t^{k-1} e^{-tZ} dt / (k-1)! turns every moment into integrals of M_k(t) = E[e^{ka} exp(-t e^a)]:
    E sum p^k       = n      int t^{k-1}/(k-1)! M_k M_0^{n-1} dt
    E (sum p^2)^2   = E sum p^4 + n(n-1) int t^3/3! M_2^2 M_0^{n-2} dt
both by trapezoid in ln t and a, where the integrands are smooth and decay doubly exponentially. Source: THEORY.md, section 2.

Letters: n keys, v score variance, Q_k = sum_j p_j^k.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from megadsl.errors import UserError

# Score variance up to which e^{4a} times the Gaussian density stays a double.
LARGEST_VARIANCE = 80.0


def simple(n: float, v: float) -> float:
    """E p^2 = e^v / n^2: v below 0.3 for 2 %, below 1 for 10 % at n >= 100."""
    return math.exp(v) / n ** 2


def improved(n: float, v: float) -> float:
    """E p^2 of the paper's improved form; better than `simple` only for n >> e^{2v}."""
    grown = v * n / (n - 1.0)
    return 1.0 / n ** 2 + (math.exp(grown) - 1.0) * math.exp(2.0 * grown) / ((n - 1.0) * math.exp(v) + 1.0) ** 2


def ratio(n: float, v: float) -> float:
    """E p^2 = e^v / (n (e^v + n - 1)): never above 1/n, the best closed form."""
    return math.exp(v) / (n * (math.exp(v) + n - 1.0))


def exact(n: float, v: float) -> float:
    """E p^2 from the integral, for any v."""
    return float(weight_moments(np.array([float(n)]), v)[0, 0] / n)


def weight_moments(n: np.ndarray, v: float) -> np.ndarray:
    """[E Q_2, E Q_3, E Q_2^2] for every n (array, real numbers >= 1), stacked: [3, len(n)]."""
    n = np.asarray(n, dtype=float)
    if v > LARGEST_VARIANCE:
        raise UserError(
            f"Attention scores of variance {v:.4g} are beyond the theory (it holds up to {LARGEST_VARIANCE:g}; there every row is "
            "one-hot); make variance, query_std or key_std smaller."
        )
    if v < 1e-7:
        return np.stack([1.0 / n, 1.0 / n ** 2, 1.0 / n ** 2])
    root = math.sqrt(v)
    # The integrand lives where Z ~ 1/t: from n e^{v/2} keys down to the largest single weight.
    low, high = -math.log(n.max()) - 0.5 * v - 3.0 * root - 9.0, 7.0 * root + 4.0
    log_t = np.linspace(low, high, max(120, int((high - low) / 0.16)))
    z = np.linspace(-8.0, 8.0 + 4.0 * root, max(80, int((16.0 + 4.0 * root) * max(1.0, root) / 0.2)))
    step_z = (z[1] - z[0]) / math.sqrt(2.0 * math.pi)
    density = np.exp(-0.5 * z * z) * step_z
    a = root * z
    kernel = np.exp(-np.exp(np.clip(log_t[:, None] + a, None, 6.55)))
    # One exponential: e^{4a} alone overflows long before its product with the density does.
    powers = np.exp(np.outer(np.arange(5), a) - 0.5 * z * z) * step_z
    m0, _, m2, m3, m4 = (kernel @ powers.T).T
    # The grid must hold all of the mass of the density, or M_0(0) would not be 1.
    log_m0 = np.log(np.maximum(m0 / density.sum(), 1e-300))
    step = log_t[1] - log_t[0]
    t = np.exp(log_t)
    rest = np.exp(np.outer(n - 1.0, log_m0))
    rest2 = np.exp(np.outer(np.maximum(n - 2.0, 0.0), log_m0))
    q2 = n * (rest @ (t ** 2 * m2)) * step
    q3 = n * (rest @ (t ** 3 / 2.0 * m3)) * step
    q4 = n * (rest @ (t ** 4 / 6.0 * m4)) * step
    q22 = q4 + n * (n - 1.0) * (rest2 @ (t ** 4 / 6.0 * m2 ** 2)) * step
    return np.stack([q2, q3, q22])


@dataclass(frozen=True)
class AttentionWeights:
    """What attention needs of its weights, one entry a row (query) with n_t keys and score variance v_t.

    p2: E Q_2. s: E[Q_2 - 2 Q_3 + Q_2^2] = tr C^2 for C = diag(p) - p p^T. s_tilted: the same weighted by the fluctuation of v (K
    path). tilt: E[1 - Q_2 - 6 Q_3 + 6 Q_2^2], by how much the average of the values moves along the query (attention.py).
    spread: E (1 - Q_2)^2. shape: w of the joint moments, E sum_s p_ts p_t's = 1/n + (p2 - 1/n) (e^{rho w} - 1) / (e^w - 1).
    """

    p2: np.ndarray
    s: np.ndarray
    s_tilted: np.ndarray
    tilt: np.ndarray
    spread: np.ndarray
    shape: np.ndarray


_FIELDS = 6


def fluctuation_nodes(omega: float) -> tuple[np.ndarray, np.ndarray]:
    """Three nodes x and weights of a Gamma variable of mean 1 and variance omega: the score variance of a head is v x.

    A head of finite size has omega = 2/d_h + 4/d: |W_q x|^2 and |W_k^T q|^2 fluctuate (THEORY.md, section 3).
    """
    if omega < 1e-6:
        return np.ones(1), np.ones(1)
    # Gauss rule for weight x^{alpha-1} e^{-x} (generalised Laguerre), alpha = 1/omega, by the eigenvalues of its Jacobi matrix.
    alpha = 1.0 / omega
    order = np.arange(3)
    off = np.sqrt(order[1:] * (order[1:] + alpha - 1.0))
    nodes, vectors = np.linalg.eigh(np.diag(2.0 * order + alpha) + np.diag(off, 1) + np.diag(off, -1))
    return nodes * omega, vectors[0] ** 2


def attention_weights(n: np.ndarray, v: float, omega: float) -> AttentionWeights:
    """Exact moments for rows of `n` keys that share one mean score variance v."""
    return AttentionWeights(*_averaged(np.asarray(n, dtype=float), v, omega))


def _averaged(n: np.ndarray, v: float, omega: float) -> np.ndarray:
    """The fields of AttentionWeights, averaged over the fluctuation of v: [6, len(n)]."""
    total = np.zeros((_FIELDS, len(n)))
    for x, weight in zip(*fluctuation_nodes(omega), strict=True):
        q2, q3, q22 = weight_moments(n, v * x)
        s = np.maximum(q2 - 2.0 * q3 + q22, 0.0)
        total += weight * np.stack([q2, s, x * s, 1.0 - q2 - 6.0 * q3 + 6.0 * q22, 1.0 - 2.0 * q2 + q22, np.zeros_like(n)])
    total[5] = joint_shape(n, v, weight_moments(n, v)[0])
    return total


def joint_shape(n: np.ndarray, v: float, p2: np.ndarray) -> np.ndarray:
    """w with w / (e^w - 1) = c_1 / (p2 - 1/n), c_1 = v (1 - p2)^2 / (n - 1) the exact slope of the joint moment at rho = 0
    (Stein)."""
    if v < 1e-5:
        return np.full_like(n, v)
    excess = np.maximum(p2 - 1.0 / n, 1e-300)
    target = v * (1.0 - p2) ** 2 / np.maximum(n - 1.0, 1e-9) / excess
    target = np.where(n > 1.5, np.clip(target, 1e-6, 1.0), v / math.expm1(v))
    w = np.full_like(n, v)
    for _ in range(30):
        # Newton on ln(w / (e^w - 1)), which is convex and falls with slope between -1/2 and -1.
        value = np.log(w / np.expm1(w)) - np.log(target)
        slope = 1.0 / w - 1.0 / (-np.expm1(-w))
        w = np.maximum(w - value / slope, 1e-6)
    return w


class WeightTable:
    """AttentionWeights on a fixed set of row lengths for any v in [0, largest]: Chebyshev in v, then linear on a fine grid."""

    _FINE = 512

    def __init__(self, n: np.ndarray, largest: float, omega: float):
        # Moments bend from e^v / n to saturation, over a range that grows with v.
        degree = 10 if largest <= 1.0 else 18 if largest <= 4.0 else 48
        nodes = 0.5 * largest * (1.0 - np.cos(np.pi * (np.arange(degree) + 0.5) / degree))
        values = np.stack([_averaged(n, v, omega) for v in nodes])
        # w vanishes with v; w / v is smooth down to 0.
        values[:, 5] /= nodes[:, None]
        fine = np.linspace(0.0, largest, self._FINE + 1)
        fit = np.polynomial.chebyshev.chebvander(2.0 * nodes / largest - 1.0, degree - 1)
        read = np.polynomial.chebyshev.chebvander(2.0 * fine / largest - 1.0, degree - 1)
        resampled = read @ np.linalg.solve(fit, values.reshape(degree, -1))
        self._table = np.ascontiguousarray(resampled.reshape(self._FINE + 1, _FIELDS, len(n)).transpose(0, 2, 1))
        self._rows = np.arange(len(n))
        self._scale = self._FINE / largest

    def read(self, v: np.ndarray) -> AttentionWeights:
        """Rows with score variances v, one for each length of the table."""
        place = np.clip(v * self._scale, 0.0, self._FINE - 1e-9)
        index = place.astype(np.intp)
        low = self._table[index, self._rows]
        values = low + (place - index)[:, None] * (self._table[index + 1, self._rows] - low)
        # For two keys w / v vanishes with v as well, up to the rounding of the fit.
        values[:, 5] = np.maximum(values[:, 5], 0.0) * np.maximum(v, 0.0)
        return AttentionWeights(*values.T)


@lru_cache(maxsize=64)
def _cached_table(n: tuple[float, ...], largest: float, omega: float) -> WeightTable:
    return WeightTable(np.array(n), largest, omega)


def weight_table(n: np.ndarray, largest: float, omega: float) -> WeightTable:
    """A cached table; `largest` is rounded up to a power of two so that layers and schemes share it.

    Beyond v = 16 a row of fewer than some thousand keys is one-hot, and reads return the value at 16.
    """
    rounded = 2.0 ** math.ceil(math.log2(max(largest, 0.25)))
    return _cached_table(tuple(np.asarray(n, dtype=float)), min(rounded, 16.0), round(omega, 6))
