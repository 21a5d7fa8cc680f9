"""Attention at initialisation: second moments of its output and of the gradients it passes on, for any mask.

Per head a_ts = q_t . k_s / sqrt(d_h) with random projections. Given the inputs, a row of scores is Gaussian over its keys with
variance v_t = kappa q_t e_t, kappa = kappa_q kappa_k = d^2 sigma_q^2 sigma_k^2, q_t the query's second moment, e_t = (mean second
moment - mean overlap) of its keys; the part that keys share shifts all scores alike and cancels. Two queries' scores at one key
correlate by rho = K_tt' / sqrt(q_t q_t'). With the exact weight moments of softmax.py, per kappa_v kappa_o,

  O_tt  = U_tt + (P2 - 1/n_t) e_t + kappa q_t e_t^2 T / d + P2 D_t p_a / (1 - p_a)
  O_tt' = U_tt' + (P11 - 1/max) e   + kappa K_tt' e_t e_t' (1 - P11) / d,        U = P K P^T (uniform attention), D_t = mean key
  moment

  P11 = 1/max + (P2 - 1/n) f min/max,  f(rho) = (e^{rho w} - 1)/(e^w - 1)        joint weights of two queries; P2, n of the
        earlier, whose weights recur in the later row with the share of the keys that it holds, E Z_t / Z_t' = min/max
  S11 = (1 - P2_t)(1 - P2_t') / (max - 1) + (S - (1 - P2)^2 / (n - 1)) f min/max,  S = E tr C^2, C = diag(p) - p p^T
  T = E[1 - Q_2 - 6 Q_3 + 6 Q_2^2]: sum_ss' E[p_s p_s' x_s . x_s'] by Stein's identity; scores pull the average along the query.

Backward, per kappa_v kappa_o, G the Gram matrix of the gradient at the output (g through W_o has independent coordinates a head):
  values   V_ss  = sum_tt' G P11 / min over queries that see s;  V_ss' with (1 - P11)/(n_t n_t' - min)
  keys     K_ss  = kappa sum_tt' G K_tt' e S11 / min, rows summing to zero (softmax ignores a common shift)
  queries  Q_tt' = kappa G e_t e_t' [S11 (1 + rho v/d_h) + (1 - P2_t)(1 - P2_t')/d];  diagonal (1 + v/d_h + 1/d) S + E(1 -
  Q_2)^2/d
Attention dropout acts on whole values: P2/(1 - p_a) on V_ss, and p_a/(1 - p_a) S D added inside the K and Q diagonals.

Soft-capped scores (softcap.py): weights and rho are those of the capped scores; S gets the gradient's loss in the cap (`passed`), the
tilt and what follows a score E p . f' (`slope`) for each factor; and because a common shift is not ignored any more, rows of K
sum to `leak`, and Q gets `leak` times what keys have in common.

Finite heads: the score variance of a head fluctuates by omega = 2/d_h + 4/d and rho by (1 + rho^2) omega / 2; both are averaged
over. Keys of fixed length (on a sphere) have thinner tails: ln E e^{sa} = v s^2/2 - v^2 s^4/(4d), so P2 ~ e^{v - 3.5 v^2/d}/n,
P11 ~ e^{rho v - v^2 ((1 + rho)^2 - 1/2)/d}/n, and the tilt shrinks by (1 - v/d)^2; the part that keys share takes the effect away
(`_sphere`). Rotary positions replace K by K R wherever scores are meant. Grouped queries change nothing at fixed stds. Source:
THEORY.md, sections 2-6b; T, the Wishart and v/d_h terms of Q, f's w and the dropout terms are derived here.

Letters: t, t' queries, s, s' keys, n_t keys of a query, d width, d_h head size, B blocks of the grid.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from megadsl.theory.grid import Gram, Mask
from megadsl.theory.softcap import capped_weights, overlaps
from megadsl.theory.softmax import AttentionWeights, attention_weights, weight_table


@dataclass(frozen=True)
class AttentionShape:
    """What the moments of an attention branch depend on besides its input.

    `normed`: the rows of the input have a fixed length (behind a norm) instead of Gaussian coordinates. `softcap`: cap on scores; 0:
    none.
    """

    width: int
    head_dim: int
    dropout: float = 0.0
    qk_norm: bool = False
    normed: bool = False
    softcap: float = 0.0

    @property
    def omega(self) -> float:
        """Relative variance of a head's score variance; normalised queries and keys have no fluctuating length."""
        return (0.0 if self.qk_norm else 2.0 / self.head_dim) + (2.0 if self.normed else 4.0) / self.width


@dataclass(frozen=True)
class Rotary:
    """Overlap that rotations leave, R(t - t'): block means between queries and its mean over the keys of a query."""

    off: np.ndarray
    row_mean: np.ndarray

    @classmethod
    def on(cls, off: np.ndarray, mask: Mask) -> "Rotary":
        return cls(off, mask.score_average(off, np.ones(len(off))))


class AttentionSignal:
    """One attention branch on given inputs; `output` per kappa_v kappa_o = 1, `backward` on demand.

    `table_limit`: None computes the weight moments for one common score variance (exact, for exchangeable inputs); a number reads
    them from a cached table up to that score variance (deep recursions).
    """

    def __init__(self, shape: AttentionShape, mask: Mask, kappa: float, queries: Gram, keys: Gram,
                 rotary: Rotary | None = None, table_limit: float | None = None):
        self.shape, self.mask, self.queries = shape, mask, queries
        uniform, self.key_moment = mask.average(keys)
        n = mask.count
        excess = np.maximum(n, 2.0) / (np.maximum(n, 2.0) - 1.0)
        self.excess = excess * np.maximum(self.key_moment - uniform.diag, 0.0)
        self.score_excess = self.excess
        overlap = queries.off
        if rotary is not None:
            overlap = queries.off * rotary.off
            rotated = mask.score_average(keys.off * rotary.off, keys.diag)
            self.score_excess = excess * np.maximum(self.key_moment - rotated, 0.0)
        if shape.qk_norm:
            kappa = 1.0 / (float(queries.diag.mean()) * float(self.key_moment.mean()))
        self.kappa, self.score_overlap = kappa, overlap
        self.score_variance = kappa * queries.diag * self.score_excess
        self.sphere = self._sphere()
        tails = 1.0 + 3.5 * self.sphere * self.score_variance
        # Share of the variance of scores that the keys of a query have in common.
        self.share = 1.0 - np.clip(self.score_excess / np.maximum(self.key_moment, 1e-12), 0.0, 1.0)
        whole = kappa * queries.diag * self.key_moment
        if shape.softcap:
            self.weights = capped_weights(n, whole / tails, self.share, shape.softcap, shape.omega, table_limit)
        else:
            self.weights = self._weights(n, self.score_variance / tails, table_limit)
        root = np.sqrt(np.maximum(queries.diag, 1e-300))
        self.rho = np.clip(overlap / np.outer(root, root), -1.0, 1.0)
        self.score_rho, self.slope, self.passed, self.passed_pairs, self.leak, self.leak_pairs = self.rho, 1.0, 1.0, 1.0, 0.0, 0.0
        if shape.softcap:
            self._cap(float(whole.mean()))
        self._joint()
        if shape.softcap:
            self.leak_pairs = self.leak_pairs * self.p11
        self.output = self._output(uniform, rotary)

    def _sphere(self) -> np.ndarray:
        """1/d times the share of their own part that keys of fixed length have fixed: 1 at r = 0, none from r = 1/3 on."""
        if not self.shape.normed:
            return np.zeros_like(self.excess)
        own = np.clip(self.excess / np.maximum(self.key_moment, 1e-12), 1e-6, 1.0)
        return np.clip(1.0 - 2.0 * (1.0 - own) / own, 0.0, 1.0) / self.shape.width

    def _weights(self, n: np.ndarray, v: np.ndarray, table_limit: float | None) -> AttentionWeights:
        if table_limit is None:
            return attention_weights(n, float(v[-1]), self.shape.omega)
        return weight_table(n, table_limit, self.shape.omega).read(v)

    def _cap(self, variance: float) -> None:
        """What a cap does to pairs of queries at scores of one variance."""
        found, share = overlaps(round(variance, 9), self.shape.softcap), self._common(self.share)

        def correlation(overlap: Callable) -> np.ndarray:
            own = overlap(1.0) - overlap(share)
            joint = overlap(self.rho) - overlap(self.rho * share)
            return np.where(own > 1e-9, joint / np.maximum(own, 1e-9), self.rho)

        weights = self.weights
        self.score_rho = np.clip(correlation(found.capped), -1.0, 1.0)
        self.slope, self.passed, self.leak = weights.slope, weights.passed, weights.leak
        self.passed_pairs = self._common(weights.passed) * found.slopes(self.rho) / found.slopes(1.0)
        self.leak_pairs = self._common(weights.leak / weights.p2) * np.clip(correlation(found.slopes), -1.0, 1.0)

    def _joint(self) -> None:
        """P11, S11 and rho S11 for every pair of different queries, averaged over the fluctuation of rho."""
        weights, smaller, larger = self.weights, self.mask.smaller, self.mask.larger
        w = np.sqrt(np.outer(weights.shape, weights.shape))
        omega = self.shape.omega
        rho = self.score_rho
        sphere = np.sqrt(np.outer(self.sphere, self.sphere)) * (1.5 * rho - 0.5 - rho ** 2)
        grown = np.exp(np.minimum(rho * w + (0.25 * omega * (1.0 + rho ** 2) + sphere) * w * w, 60.0))
        whole = np.maximum(np.expm1(np.minimum(w + 0.5 * omega * w * w, 60.0)), 1e-12)
        small = w < 1e-6
        fraction = np.where(small, rho, (grown - 1.0) / whole)
        slope = np.where(small, 1.0, w * grown / whole)
        row_excess = weights.p2 - 1.0 / self.mask.count
        share = smaller / larger
        self.p11 = 1.0 / larger + share * self._common(row_excess) * fraction
        still = 1.0 - weights.p2
        base = np.outer(still, still) / np.maximum(larger - 1.0, 0.5)
        own_base = still ** 2 / np.maximum(self.mask.count - 1.0, 0.5)
        row = np.maximum(weights.s - own_base, 0.0)
        gain = share * self._common(row)
        self.s11 = base + gain * fraction
        self.rho_s11 = self.rho * self.s11 + 0.5 * omega * (1.0 + self.rho ** 2) * gain * slope

    def _output(self, uniform: Gram, rotary: Rotary | None) -> Gram:
        shape, weights, e = self.shape, self.weights, self.excess
        common = self._common(e)
        pull = np.sqrt(np.maximum(rotary.row_mean, 0.0)) if rotary is not None else np.ones_like(e)
        pull = pull * self.slope
        tilt = self.kappa / shape.width * np.outer(pull * e, pull * e) * self.queries.off * (1.0 - self.p11)
        off = uniform.off + (self.p11 - 1.0 / self.mask.larger) * common + tilt
        keep = 1.0 - shape.dropout
        diag = (uniform.diag + (weights.p2 - 1.0 / self.mask.count) * e
                + self.kappa / shape.width * self.queries.diag * (pull * e) ** 2 * weights.tilt
                * (1.0 - 2.0 * np.minimum(self.sphere * self.score_variance, 0.5))
                + weights.p2 * self.key_moment * shape.dropout / keep)
        return Gram(off, diag)

    def _common(self, rows: np.ndarray) -> np.ndarray:
        """A row quantity for the keys that two queries share: those of the earlier one."""
        if not self.mask.causal:
            return np.sqrt(np.outer(rows, rows))
        blocks = np.arange(len(rows))
        return rows[np.minimum.outer(blocks, blocks)]

    def backward(self, gradient: Gram) -> tuple[Gram, Gram]:
        """(gradient at the queries' input, gradient at the keys' and values' input), per kappa_v kappa_o = 1."""
        value = self._value_path(gradient)
        key = self._key_path(gradient)
        return self._query_path(gradient), Gram(value.off + key.off, value.diag + key.diag)

    def _value_path(self, gradient: Gram) -> Gram:
        n, p2, mask = self.mask.count, self.weights.p2, self.mask
        pairs = np.maximum(n * n - n, 1e-9)
        different = Gram(gradient.off * (1.0 - self.p11) / np.maximum(mask.smaller * mask.larger - mask.smaller, 1e-9),
                         np.where(n > 1.0, gradient.diag * (1.0 - p2) / pairs, 0.0))
        # Row 1 has one key, which it shares with everybody: no pair of different keys through itself.
        same = Gram(gradient.off * self.p11 / mask.smaller, gradient.diag * p2 / n / (1.0 - self.shape.dropout))
        return Gram(mask.gather(different).off, mask.gather(same).diag)

    def _key_path(self, gradient: Gram) -> Gram:
        mask, n = self.mask, self.mask.count
        root = np.sqrt(self.queries.diag)
        excess = self._common(self.excess)
        off = self.kappa * gradient.off * np.outer(root, root) * self.rho_s11 * excess * self.passed_pairs
        noise = self.shape.dropout / (1.0 - self.shape.dropout) * self.key_moment * self.weights.s
        diag = self.kappa * gradient.diag * self.queries.diag * (self.excess * self.weights.s_tilted + noise) * self.passed
        own = mask.gather(Gram(off / mask.smaller, diag / n))
        if self.shape.softcap:
            off = off - self.kappa * gradient.off * self.queries.off * self.leak_pairs * excess
            diag = diag - self.kappa * gradient.diag * self.queries.diag * self.leak * self.excess
        rest = mask.gather_both(Gram(off / (mask.smaller * np.maximum(mask.smaller - 1.0, 0.5)),
                                     diag / (n * np.maximum(n - 1.0, 0.5))))
        return Gram(-rest, own.diag)

    def _query_path(self, gradient: Gram) -> Gram:
        width, weights, e, score = self.shape.width, self.weights, self.excess, self.score_excess
        still = 1.0 - weights.p2
        both = np.sqrt(np.outer(e * score, e * score))
        # Along the query, one of d_h directions, the weights follow the keys: their spread there is 1 + v (1 + rho v for two
        # queries).
        along = self.score_variance * self.slope ** 2 / self.shape.head_dim
        beside = 1.0 + self.rho * np.sqrt(np.outer(along, along))
        moved = still * self.slope
        off = self.kappa * gradient.off * both * (self.s11 * self.passed_pairs * beside + np.outer(moved, moved) / width)
        noise = self.shape.dropout / (1.0 - self.shape.dropout) * self.key_moment * score * weights.s
        diag = self.kappa * gradient.diag * (
            e * score * ((1.0 + along + 1.0 / width) * weights.s * self.passed + weights.spread * self.slope ** 2 / width)
            + noise * self.passed)
        if self.shape.softcap:
            common = e * self.key_moment * self.share
            off = off + self.kappa * gradient.off * self._common(common) * self.leak_pairs
            diag = diag + self.kappa * gradient.diag * common * self.leak
        return Gram(off, diag)
