"""Scalar level: one second moment q and one token correlation r a sublayer, the paper's form of the recursion.

At every depth positions are taken to be exchangeable again. For fixed weights an attention branch is then a function of r alone:
    mbar(r), cbar(r)                       second moment and overlap of its output, means over positions
    q_g' = a(r) q_g + b(r) c_g,  c_g' = e(r) q_g + f(r) c_g     (the gradient map is linear)
which are tabulated once from attention.py and read 2000 times in plain Python. Exact for bidirectional attention; for causal
attention it misses what the matrix level (recursion.py) tracks: early positions differ from late ones, more with every layer.

Letters: q second moment, c overlap of two tokens, r = c/q, q_g, c_g the same of the gradient.
"""

import math
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from megadsl.theory.attention import AttentionShape, AttentionSignal
from megadsl.theory.grid import Gram, Grid, Mask, causal_grid, means, uniform_grid
from megadsl.theory.quadrature import ACTIVATIONS, dual_map
from megadsl.theory.shape import ModelShape, Sublayer

# Chebyshev-like nodes in r, denser at both ends: r starts near 0, and 1 - r matters near 1.
_NODES = 0.5 * (1.0 - np.cos(np.pi * np.arange(13) / 12.0))
_FINE = 512


@lru_cache(maxsize=64)
def _attention_table(shape: AttentionShape, kappa: float, length: int, causal: bool, memory: int, memory_r: float) -> list[tuple]:
    """Rows (mbar, cbar, a, b, e, f, memory a, memory b, memory e, memory f) at r = i / _FINE; memory = 0: self-attention."""
    grid = causal_grid(length) if causal else uniform_grid(length)
    keys_grid = uniform_grid(memory) if memory else grid
    mask = Mask(grid, keys_grid, causal)
    limit = kappa if not shape.qk_norm else 1.0
    rows = []
    for r in _NODES:
        inputs = _exchangeable(grid, 1.0, float(r))
        keys = _exchangeable(keys_grid, 1.0, memory_r) if memory else inputs
        signal = AttentionSignal(shape, mask, kappa, inputs, keys, None, 1.02 * limit)
        row = list(means(grid, signal.output))
        at_memory = []
        for q_g, c_g in ((1.0, 0.0), (0.0, 1.0)):
            at_queries, at_keys = signal.backward(_exchangeable(grid, q_g, c_g))
            total = at_queries if memory else at_queries.plus(at_keys, 1.0, 1.0)
            row.append(means(grid, total))
            at_memory.append(means(keys_grid, at_keys))
        (a, e), (b, f) = row[2], row[3]
        rows.append([row[0], row[1], a, b, e, f, at_memory[0][0], at_memory[1][0], at_memory[0][1], at_memory[1][1]])
    # Polynomial through the nodes in the angle of r: exact at the nodes, smooth between.
    fine = np.linspace(0.0, 1.0, _FINE + 1)
    fit = np.polynomial.chebyshev.chebvander(2.0 * _NODES - 1.0, len(_NODES) - 1)
    read = np.polynomial.chebyshev.chebvander(2.0 * fine - 1.0, len(_NODES) - 1)
    return [tuple(row) for row in (read @ np.linalg.solve(fit, np.array(rows))).tolist()]


def _exchangeable(grid: Grid, second_moment: float, overlap: float) -> Gram:
    blocks = len(grid.sizes)
    return Gram(np.full((blocks, blocks), overlap), np.full(blocks, second_moment))


def _read(table: list[tuple], r: float) -> list[float]:
    place = min(max(r, 0.0), 1.0) * _FINE
    index = min(int(place), _FINE - 1)
    part = place - index
    return [low + part * (high - low) for low, high in zip(table[index], table[index + 1], strict=True)]


@dataclass
class ScalarStep:
    """One sublayer: state behind it, 1 / second moment at its norms (1 where there is none; the inner one with its factor), and
    the linear gradient map of its branch."""

    sublayer: Sublayer
    q: float
    r: float
    inner: float
    outer: float
    branch: tuple[float, float, float, float]
    memory: tuple[float, float, float, float] | None = None


class ScalarRecursion:
    """One stack under the exchangeable closure; the counterpart of recursion.MatrixRecursion."""

    def __init__(self, shape: ModelShape, name: str, memory: tuple[float, float] | None = None, memory_length: int = 0):
        """`memory`: (second moment, token correlation) of what cross-attention attends to."""
        self.shape, self.name = shape, name
        self.length, self.causal = shape.stack_length(name), name == "decoder"
        self.memory_q, self.memory_r = memory or (1.0, 0.0)
        self.memory_length = memory_length
        self.attention_shape = AttentionShape(shape.hidden_size, shape.head_dim, shape.attention_dropout, shape.qk_norm,
            normed=shape.norm_position != "none", softcap=shape.attention_softcap)
        self.gated = ACTIVATIONS[shape.activation].gated or shape.activation == "squared_relu"
        self.steps: list[ScalarStep] = []
        self.start = (1.0, 0.0)
        self._tables: dict[float, list] = {}
        self._maps: dict[float, tuple] = {}

    def forward(self, q: float, r: float, sublayers: list[Sublayer]) -> tuple[float, float]:
        """Run the sublayers; open stds are solved for unit branches. -> (q, r) of the stream."""
        shape, keep = self.shape, 1.0 - self.shape.dropout
        self.start = (q, r)
        for sublayer in sublayers:
            inner, outer, seen = 1.0, 1.0, r
            if shape.inner_norm:
                inner = sublayer.norm_scale ** 2 / (q + shape.eps)
                # Behind another norm rows have a fixed length already.
                seen = r if shape.outer_norm and self.steps else self._sampled(r)
            branch_of = self._ffn if sublayer.kind == "ffn" else self._attention
            solved, q_f, c_f, branch, memory = branch_of(sublayer, q * inner, seen, keep)
            lam2, beta2 = sublayer.residual_scale ** 2, sublayer.branch_scale ** 2
            total, overlap = lam2 * q + beta2 * q_f, lam2 * q * r + beta2 * c_f
            r = overlap / total
            if shape.outer_norm:
                outer, rho = 1.0 / (total + shape.eps), beta2 * q_f / (lam2 * q)
                r -= rho / (1.0 + rho) ** 2 * (1.0 - r) * (2.0 + r) / shape.hidden_size * (1.0 if r > 0 else -1.0)
            q = total * outer
            self.steps.append(ScalarStep(solved, q, r, inner, outer, branch, memory))
        return q, r

    def final(self, q: float, r: float) -> tuple[float, float]:
        """The head's (or memory's) input: normed once more in Pre-LN."""
        return (q / (q + self.shape.eps), self._sampled(r)) if self.shape.final_norm else (q, r)

    def _sampled(self, r: float) -> float:
        """A norm divides rows by their own length: the mean of a sample correlation."""
        return r * (1.0 - (1.0 - r * r) / (2.0 * self.shape.hidden_size))

    def backward(self, q_g: float, c_g: float) -> tuple[list[tuple[float, float]], tuple[float, float]]:
        """(gradient moments after the embedding and after every sublayer, gradient moments at the memory)."""
        shape, keep = self.shape, 1.0 - self.shape.dropout
        # Fluctuating row norms, as in recursion.MatrixRecursion.
        spread = 1.0 + 1.0 / shape.hidden_size if shape.final_norm else 1.0
        if shape.final_norm:
            norm = spread / ((self.steps[-1].q if self.steps else self.start[0]) + shape.eps)
            q_g, c_g = q_g * norm, c_g * norm
        found, memory_q, memory_c, projected = [(q_g, c_g)], 0.0, 0.0, shape.projected
        for step in reversed(self.steps):
            lam2, beta2 = step.sublayer.residual_scale ** 2, step.sublayer.branch_scale ** 2
            if shape.outer_norm:
                norm, projected = step.outer * projected, 1.0
                q_g, c_g = q_g * norm, c_g * norm
            dropped, scale = q_g / keep, beta2 * step.inner * spread
            a, b, e, f = step.branch
            if step.memory is not None:
                ma, mb, me, mf = step.memory
                memory_q += beta2 * (ma * dropped + mb * c_g)
                memory_c += beta2 * (me * dropped + mf * c_g)
            q_g, c_g = lam2 * q_g + scale * (a * dropped + b * c_g), lam2 * c_g + scale * (e * dropped + f * c_g)
            found.append((q_g, c_g))
        return found[::-1], (memory_q, memory_c)

    def _ffn(self, sublayer: Sublayer, unit: float, r: float, keep: float) -> tuple:
        weights, shape = sublayer.weight_std, self.shape
        std = weights["fc1"] * math.sqrt(shape.hidden_size * unit)
        key = round(std, 4)
        if key not in self._maps:
            self._maps[key] = dual_map(shape.activation, std, shape.hidden_size)
        table, factor = self._maps[key]
        power = factor ** 4 if self.gated else factor ** 2
        overlap, slope = table.at(math.acos(min(max(r, -1.0), 1.0)))
        fc2 = weights["fc2"]
        if fc2 is None:
            fc2 = math.sqrt(keep / (shape.ffn_hidden_size * table.second_moment * power))
            sublayer = replace(sublayer, weight_std={**weights, "fc2": fc2})
        gain = shape.ffn_hidden_size * fc2 * fc2
        back = gain * shape.hidden_size * weights["fc1"] ** 2 * power / factor ** 2
        branch = (back * table.gain, 0.0, 0.0, back * slope)
        return sublayer, gain * power * table.second_moment / keep, gain * power * overlap, branch, None

    def _attention(self, sublayer: Sublayer, unit: float, r: float, keep: float) -> tuple:
        weights, shape, cross = sublayer.weight_std, self.shape, sublayer.kind == "cross_attention"
        keys = self.memory_q if cross else unit
        # Scores have the scale of queries times keys; the table, for inputs of second moment 1, is the same to a relative 1 %.
        kappa = (shape.hidden_size * weights["query"] * weights["key"]) ** 2 * unit * keys
        key = (round(math.log(max(kappa, 1e-12)), 2), cross)
        if key not in self._tables:
            self._tables[key] = _attention_table(
                self.attention_shape, kappa, self.length, self.causal and not cross, self.memory_length if cross else 0,
                round(self.memory_r, 4) if cross else 0.0)
        mbar, cbar, a, b, e, f, *memory = _read(self._tables[key], r)
        fan = shape.hidden_size * shape.num_heads * shape.head_dim
        if weights["value"] is None:
            std = (keep / (fan * mbar * keys)) ** 0.25
            weights = {**weights, "value": std, "attention_output": std}
            sublayer = replace(sublayer, weight_std=weights)
        gain = fan * (weights["value"] * weights["attention_output"]) ** 2
        # The gradient at the queries grows with the keys and falls with the queries that share their scores' variance.
        branch = tuple(gain * keys / unit * x for x in (a, b, e, f))
        scaled = tuple(gain * x for x in memory) if cross else None
        return sublayer, gain * keys * mbar / keep, gain * keys * cbar, branch, scaled
