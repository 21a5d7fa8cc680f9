"""Matrix level: the token Gram matrix forward and the gradient Gram matrix backward, sublayer by sublayer, on a position grid.

  Pre-LN    Q <- lambda^2 Q + beta^2 F(N(Q))                          N(Q)_tt' = Q_tt' / sqrt((q_t + eps)(q_t' + eps))
            Gam <- lambda^2 Gam + beta^2 B(Gam) / sqrt((q_t + eps)(q_t' + eps))
  Post-LN   Q <- N(Y), Y = lambda^2 Q + beta^2 F(Q);    Gam <- (lambda^2 + beta^2 B)(Gam / sqrt((y_t + eps)(y_t' + eps)))
Both norms (Keel) and none (ReZero) are the same lines with both factors or neither; a fixed factor s on the norm in front of the
branch multiplies N(Q) and B by s^2.
F is the branch's Gram matrix (attention.py; FFN elementwise by quadrature.DualMap), B its backward map; hidden dropout divides
diagonals by 1-p. Post-LN rows are divided by their own fluctuating norms: the correlation loses rho/(1+rho)^2 (1-r)(2+r)/d a
sublayer, rho = beta^2 q_F / lambda^2. Source: THEORY.md, sections 6 and 6b.
Where positions enter with unequal second moments (loud and silent frames), the skip carries the inequality on, lambda^2 of it an
addition, until a norm ends it: with q + delta for the second moment of a share of the positions, overlaps behind a norm are
a = E[(1 + delta/q)^-1/2]^2 times, second moments of its gradient b = E[1 / (1 + delta/q)] times those of equal positions.

Letters: Q, K forward Gram (K of the normed input), Gam gradient Gram, p hidden dropout, d width, B blocks.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from megadsl.theory.attention import AttentionShape, AttentionSignal, Rotary
from megadsl.theory.grid import Gram, Grid, Mask, block_means, blocked, causal_grid, means, stationary, uniform_grid
from megadsl.theory.inputs import rotary_overlap, sinusoidal_mean, sinusoidal_overlap
from megadsl.theory.quadrature import ACTIVATIONS, DualMap, dual_map
from megadsl.theory.shape import Embedding, ModelShape, Sublayer


class Spread(NamedTuple):
    """What unequal second moments of positions do at a norm: factors on overlaps and on the gradient's second moments."""

    overlap: float = 1.0
    gradient: float = 1.0

    def backward(self, gradient: Gram) -> Gram:
        return Gram(gradient.off * self.overlap, gradient.diag * self.gradient)


@dataclass
class Step:
    """One sublayer of the forward pass with what its backward pass needs."""

    sublayer: Sublayer
    queries: Gram                  # input of the branch
    inner: np.ndarray | None       # 1 / sqrt(second moment + eps) of the norm in front, times its factor
    outer: np.ndarray | None       # 1 / sqrt(second moment + eps) of the norm behind
    output: Gram                   # the stream after the sublayer
    gain: float                    # kappa_v kappa_o, or kappa_2
    spread_in: Spread              # of the stream at the norm in front, and at the norm behind
    spread_out: Spread


class MatrixRecursion:
    """One stack (encoder or decoder) of a model: forward and backward passes over its sublayers.

    `differ`: what enters differs by position (Embedding.positions).
    """

    def __init__(self, shape: ModelShape, name: str, memory: Gram | None = None, memory_grid: Grid | None = None,
            ratio: float = 0.08, differ: bool = False):
        self.shape, self.name = shape, name
        length = shape.stack_length(name)
        causal = name == "decoder"
        # Rotary positions give a bidirectional stack position structure too.
        structured = causal or differ or shape.rotary_base is not None
        self.grid = causal_grid(length, ratio) if structured else uniform_grid(length)
        self.mask = Mask(self.grid, self.grid, causal)
        self.memory, self.memory_grid = memory, memory_grid
        self.cross_mask = Mask(self.grid, memory_grid, False) if memory_grid is not None else None
        self.attention_shape = AttentionShape(shape.hidden_size, shape.head_dim, shape.attention_dropout, shape.qk_norm,
            normed=shape.norm_position != "none", softcap=shape.attention_softcap)
        # Row norms fluctuate: E 1/s^2 = (1 + 3/d)/sigma^2, less the 2 projections of the norm (components.layernorm; RMSNorm
        # alike). Not behind norms, where the fluctuations of successive norms are not independent of the gradient's path.
        self._norm_backward = 1.0 if shape.outer_norm else np.sqrt(1.0 + 1.0 / shape.hidden_size)
        self.rotary = None
        if shape.rotary_base is not None:
            overlap = rotary_overlap(np.arange(length), shape.head_dim, shape.rotary_base)
            self.rotary = Rotary.on(stationary(self.grid, overlap), self.mask)
        self.steps: list[Step] = []
        self.start: Gram | None = None
        # Overlap of the feature means of two positions, which LayerNorm takes away; only sinusoidal positions have a feature
        # mean.
        self._feature_mean: Gram | None = None
        self._final_norm: np.ndarray | None = None
        # Second moments of equal shares of the positions less their mean.
        self._unequal = np.zeros(1)
        self._final_spread = Spread()

    def embed(self, embedding: Embedding) -> Gram:
        """The stream after the embedding sum, its norm and its dropout."""
        word, tokentype = embedding.word_std ** 2, (embedding.tokentype_std or 0.0) ** 2
        position = (embedding.position_std or 0.0) ** 2
        blocks = len(self.grid.sizes)
        off = np.full((blocks, blocks), embedding.repeat_probability * word + embedding.same_type_probability * tokentype)
        diag = np.full(blocks, word + position + tokentype)
        if embedding.positions is not None:
            off, diag = self._by_position(embedding, word, position, embedding.same_type_probability * tokentype, tokentype)
        elif embedding.sinusoidal:
            off = off + position * stationary(self.grid, sinusoidal_overlap(np.arange(self.grid.length), self.shape.hidden_size))
            if self.shape.normalization == "LayerNorm":
                own = sinusoidal_mean(np.arange(self.grid.length), self.shape.hidden_size)
                mean, square = (block_means(self.grid, values) for values in (own, own ** 2))
                self._feature_mean = Gram(position * np.outer(mean, mean), position * square)
        total = Gram(off, diag)
        if embedding.norm_gain is not None:
            total = self._centred(total)
            total, self._feature_mean = total.scaled(embedding.norm_gain * self._norm(total)), None
        elif embedding.spread:
            self._unequal = word / (1.0 - self.shape.dropout) * (np.array(embedding.spread) - 1.0)
        self.start = Gram(total.off, total.diag / (1.0 - self.shape.dropout))
        return self.start

    def _by_position(self, embedding: Embedding, word: float, position: float, common: float, tokentype: float) -> tuple:
        """(off, diag) of the sum where positions differ."""
        content, waves = blocked(self.grid, embedding.positions.content), embedding.positions.waves
        off, diag = word * content.off + common, word * content.diag + position + tokentype
        if waves is not None:
            off = off + position * blocked(self.grid, waves @ waves.T / waves.shape[1]).off
            if self.shape.normalization == "LayerNorm":
                means_of = waves.mean(axis=1)
                self._feature_mean = blocked(self.grid, position * np.outer(means_of, means_of))
        return off, diag

    def forward(self, stream: Gram, sublayers: list[Sublayer]) -> Gram:
        """Run the sublayers; open stds are solved for unit branches."""
        for sublayer in sublayers:
            self.steps.append(self._step(stream, sublayer))
            stream = self.steps[-1].output
        return stream

    def final(self, stream: Gram) -> Gram:
        """The head's (or memory's) input: normed once more in Pre-LN."""
        if not self.shape.final_norm:
            return stream
        centred = self._centred(stream)
        self._final_norm, self._final_spread = self._norm(centred), self._spread(centred)
        normed = self._sampled(centred.scaled(self._final_norm))
        return Gram(normed.off * self._final_spread.overlap, normed.diag)

    def backward(self, gradient: Gram) -> tuple[list[Gram], Gram | None]:
        """From the gradient at `final` -> (gradients at the stream: after the embedding, after every sublayer; gradient at the
        memory)."""
        if self._final_norm is not None:
            gradient = self._final_spread.backward(gradient.scaled(self._norm_backward * self._final_norm))
        # Norms behind each other project on nearly the same directions, so the topmost takes away what all of them do.
        projected = np.sqrt(self.shape.projected)
        found, at_memory = [gradient], None
        for step in reversed(self.steps):
            sublayer = step.sublayer
            lam2, beta2 = sublayer.residual_scale ** 2, sublayer.branch_scale ** 2
            if step.outer is not None:
                gradient, projected = step.spread_out.backward(gradient.scaled(projected * step.outer)), 1.0
            branch = Gram(gradient.off, gradient.diag / (1.0 - self.shape.dropout))
            passed, memory = self._branch_backward(step, branch)
            if step.inner is not None:
                passed = step.spread_in.backward(passed.scaled(step.inner * self._norm_backward))
            gradient = gradient.plus(passed, lam2, beta2)
            if memory is not None:
                at_memory = memory.plus(memory, beta2, 0.0) if at_memory is None else at_memory.plus(memory, 1.0, beta2)
            found.append(gradient)
        return found[::-1], at_memory

    def _centred(self, stream: Gram) -> Gram:
        """The stream without its feature means, as a LayerNorm sees it."""
        return stream if self._feature_mean is None else stream.plus(self._feature_mean, 1.0, -1.0)

    def _sampled(self, normed: Gram) -> Gram:
        """Rows divided by their own length: the mean of a sample correlation over d features is r (1 - (1-r^2)/(2d))."""
        return Gram(normed.off * (1.0 - (1.0 - np.minimum(normed.off ** 2, 1.0)) / (2.0 * self.shape.hidden_size)), normed.diag)

    def _norm(self, centred: Gram) -> np.ndarray:
        return 1.0 / np.sqrt(centred.diag + self.shape.eps)

    def _spread(self, centred: Gram) -> Spread:
        """At a norm of this stream."""
        share = 1.0 + self._unequal / (float(centred.diag.mean()) + self.shape.eps)
        share = np.maximum(share, 1e-3)
        return Spread(float((share ** -0.5).mean() ** 2), float((1.0 / share).mean()))

    def _step(self, stream: Gram, sublayer: Sublayer) -> Step:
        lam2, beta2 = sublayer.residual_scale ** 2, sublayer.branch_scale ** 2
        inputs, inner, outer = stream, None, None
        spread_in = spread_out = Spread()
        if self.shape.inner_norm:
            centred = self._centred(stream)
            inner, spread_in = self._norm(centred), self._spread(centred)
            normed = centred.scaled(inner)
            normed = Gram(normed.off * spread_in.overlap, normed.diag)
            # Behind another norm rows have a fixed length already.
            inputs = normed if self.shape.outer_norm and self.steps else self._sampled(normed)
            if sublayer.norm_scale != 1.0:
                factor = np.full(len(inner), sublayer.norm_scale)
                inputs, inner = inputs.scaled(factor), inner * factor
        solved, branch, gain = self._branch(inputs, sublayer)
        self._unequal = lam2 * self._unequal  # branches add the same everywhere
        if self.shape.outer_norm:
            output, outer, spread_out = self._normed_sum(stream, branch, lam2, beta2)
        else:
            output = stream.plus(branch, lam2, beta2)
            if self._feature_mean is not None:
                # Branches have none (their weights are random), so the skip alone carries it on.
                self._feature_mean = self._feature_mean.plus(self._feature_mean, lam2, 0.0)
        return Step(solved, inputs, inner, outer, output, gain, spread_in, spread_out)

    def _normed_sum(self, stream: Gram, branch: Gram, lam2: float, beta2: float) -> tuple[Gram, np.ndarray, Spread]:
        """(stream, norm, spread at the norm) behind an addition that is normalised."""
        added = self._centred(stream).plus(branch, lam2, beta2)
        self._feature_mean = None
        norm, spread = self._norm(added), self._spread(added)
        output = added.scaled(norm)
        output = Gram(output.off * spread.overlap, output.diag)
        self._unequal = np.zeros(1)
        rho = beta2 * branch.diag.mean() / (lam2 * stream.diag.mean())
        r = np.clip(output.off, -1.0, 1.0)
        loss = rho / (1.0 + rho) ** 2 * (1.0 - r) * (2.0 + r) / self.shape.hidden_size * np.sign(r)
        return Gram(output.off - loss, output.diag), norm, spread

    def _branch(self, inputs: Gram, sublayer: Sublayer) -> tuple[Sublayer, Gram, float]:
        """(sublayer with all stds, Gram of the branch after dropout, its output gain)."""
        keep, weights = 1.0 - self.shape.dropout, dict(sublayer.weight_std)
        if sublayer.kind == "ffn":
            unit, gain = self._ffn(inputs, weights), self.shape.ffn_hidden_size
            role = "fc2"
        else:
            unit = self._attention(inputs, sublayer).output
            gain, role = self.shape.hidden_size * self.shape.num_heads * self.shape.head_dim, "value"
        if weights[role] is None:
            needed = keep / (gain * means(self.grid, unit)[0])
            if role == "fc2":
                weights["fc2"] = float(np.sqrt(needed))
            else:
                weights["value"] = weights["attention_output"] = float(needed ** 0.25)
        gain *= weights["fc2"] ** 2 if role == "fc2" else (weights["value"] * weights["attention_output"]) ** 2
        return replace(sublayer, weight_std=weights), Gram(gain * unit.off, gain / keep * unit.diag), gain

    def _attention(self, inputs: Gram, sublayer: Sublayer) -> AttentionSignal:
        weights, cross = sublayer.weight_std, sublayer.kind == "cross_attention"
        kappa = (self.shape.hidden_size * weights["query"] * weights["key"]) ** 2
        limit = 1.0 if self.shape.qk_norm else 1.02 * kappa * float(inputs.diag.max()) * self._largest_key(inputs, cross)
        return AttentionSignal(self.attention_shape, self.cross_mask if cross else self.mask, kappa, inputs,
                               self.memory if cross else inputs, None if cross else self.rotary, limit)

    def _largest_key(self, inputs: Gram, cross: bool) -> float:
        return float((self.memory if cross else inputs).diag.max())

    def _ffn_map(self, inputs: Gram, fc1_std: float) -> tuple[DualMap, float, np.ndarray, int]:
        """(map, std over the map's std, amplitude of every row relative to their mean, degree of homogeneity)."""
        mean = float(inputs.diag.mean())
        table, factor = dual_map(self.shape.activation, float(np.sqrt(self.shape.hidden_size * mean)) * fc1_std,
            self.shape.hidden_size)
        degree = 2 if ACTIVATIONS[self.shape.activation].gated or self.shape.activation == "squared_relu" else 1
        return table, factor, np.sqrt(inputs.diag / mean), degree

    def _ffn(self, inputs: Gram, weights: dict) -> Gram:
        table, factor, rows, degree = self._ffn_map(inputs, weights["fc1"])
        root = np.sqrt(inputs.diag)
        overlap = table.overlap(inputs.off / np.outer(root, root)) * factor ** (2 * degree)
        return Gram(overlap, np.full(len(rows), table.second_moment * factor ** (2 * degree))).scaled(rows ** degree)

    def _branch_backward(self, step: Step, gradient: Gram) -> tuple[Gram, Gram | None]:
        sublayer, inputs = step.sublayer, step.queries
        if sublayer.kind != "ffn":
            at_queries, at_keys = self._attention(inputs, sublayer).backward(gradient)
            scaled = Gram(step.gain * at_keys.off, step.gain * at_keys.diag)
            if sublayer.kind == "cross_attention":
                return Gram(step.gain * at_queries.off, step.gain * at_queries.diag), scaled
            return scaled.plus(at_queries, 1.0, step.gain), None
        table, factor, rows, degree = self._ffn_map(inputs, sublayer.weight_std["fc1"])
        root = np.sqrt(inputs.diag)
        gain = step.gain * self.shape.hidden_size * sublayer.weight_std["fc1"] ** 2 * factor ** (2 * degree - 2)
        slopes = table.derivative(inputs.off / np.outer(root, root))
        return Gram(gain * slopes * gradient.off, gain * table.gain * gradient.diag).scaled(rows ** (degree - 1)), None
