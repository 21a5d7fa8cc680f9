"""The sampler of whole models: a plain torch transformer with the stds of a plan, its residual stream and gradients measured by
depth.

Each draw has new weights, new tokens (independent draws from a Zipf
distribution of the wanted repeat probability) and a new random gradient of the wanted token correlation at the head's input.

Shape letters: b sequences, n tokens, d width, h heads, g key/value heads, c head size, m memory tokens.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F

from megadsl.theory.monte_carlo.components import ACTIVATIONS, tokens
from megadsl.theory.profile import Prediction
from megadsl.theory.shape import Embedding, ModelShape, Sublayer


@dataclass
class ModelMeasurement:
    """Means over draws, after the embedding (index 0) and after every sublayer; relative standard errors beside them.

    draws: [draws, points, 4] of (q, c, q_g, c_g); forward_positions, gradient_positions: [points, n] (one stack only).
    """

    draws: np.ndarray
    forward_positions: np.ndarray = field(repr=False, default=None)
    gradient_positions: np.ndarray = field(repr=False, default=None)

    @property
    def points(self) -> list[Prediction]:
        q, c, q_g, c_g = self.draws.mean(0).T
        return [Prediction(*map(float, row)) for row in zip(q, c / q, q_g, c_g / q_g, strict=True)]

    @property
    def standard_errors(self) -> np.ndarray:
        """[points, 4]: relative s.e. of q, absolute s.e. of r, relative s.e. of q_g, absolute s.e. of r_g (delta method)."""
        q, c, q_g, c_g = np.moveaxis(self.draws, 2, 0)
        mq, mg = q.mean(0), q_g.mean(0)
        spread = [q / mq, c / mq - c.mean(0) / mq ** 2 * q, q_g / mg, c_g / mg - c_g.mean(0) / mg ** 2 * q_g]
        return np.stack([part.std(0, ddof=1) for part in spread], 1) / math.sqrt(len(self.draws))

    @property
    def log_gradient(self) -> np.ndarray:
        """[points] mean over draws of ln q_g: the typical gradient, for heavy-tailed cases (Post-LN)."""
        return np.log(self.draws[:, :, 2]).mean(0)


def sample_model(shape: ModelShape, embedding: Embedding, sublayers: Sequence[Sublayer], vocab_size: int,
        gradient_correlation: float,
                 draws: int, seed: int, sequences: int = 4) -> ModelMeasurement:
    """Measure a model `draws` times. The stds of the sublayers must be filled in (DepthProfile.sublayers)."""
    generator = torch.Generator().manual_seed(seed)
    rows, forward, backward = [], 0.0, 0.0
    for _ in range(draws):
        model = _Draw(shape, embedding, vocab_size, sequences, generator)
        streams, final = model.run(sublayers)
        gradient = tokens(tuple(final.shape), 0.0, 1.0, gradient_correlation, generator)
        gradients = torch.autograd.grad(final, streams, gradient)
        rows.append([[*_moments(x), *_moments(g)] for x, g in zip(streams, gradients, strict=True)])
        if len({stream.shape for stream in streams}) == 1:
            forward = forward + torch.stack([x.detach().square().mean((0, 2)) for x in streams]) / draws
            backward = backward + torch.stack([g.square().mean((0, 2)) for g in gradients]) / draws
    positions = [None if isinstance(part, float) else part.numpy() for part in (forward, backward)]
    return ModelMeasurement(np.array(rows), *positions)


def zipf_probabilities(vocab_size: int, repeat_probability: float) -> np.ndarray:
    """p_i ~ i^-a with the exponent a that gives sum p^2 = repeat_probability (bisection)."""
    low, high, ranks = 0.0, 8.0, np.arange(1, vocab_size + 1, dtype=float)
    for _ in range(60):
        middle = 0.5 * (low + high)
        p = ranks ** -middle
        p /= p.sum()
        low, high = (middle, high) if (p * p).sum() < repeat_probability else (low, middle)
    return p


def _moments(x: torch.Tensor) -> tuple[float, float]:
    x = x.detach()
    b, n, d = x.shape
    squares = float(x.square().sum())
    total = float(x.sum(1).square().sum())
    return squares / (b * n * d), (total - squares) / (b * max(n * (n - 1), 1) * d)


class _Draw:
    """One model with its inputs."""

    def __init__(self, shape: ModelShape, embedding: Embedding, vocab_size: int, sequences: int, generator: torch.Generator):
        self.shape, self.embedding, self.generator = shape, embedding, generator
        self.vocab_size, self.sequences = vocab_size, sequences
        self.probabilities = torch.from_numpy(zipf_probabilities(vocab_size, embedding.repeat_probability))
        self.table = self._normal(embedding.word_std, vocab_size, shape.hidden_size)

    def run(self, sublayers: Sequence[Sublayer]) -> tuple[list[torch.Tensor], torch.Tensor]:
        """(streams after the embedding of the first stack and after every sublayer, input of the head)."""
        streams, memory, final = [], None, None
        for name in ("encoder", "decoder"):
            mine = [sublayer for sublayer in sublayers if sublayer.stack == name]
            if not mine:
                continue
            memory, x = final, self._embed(self.shape.stack_length(name)).requires_grad_()
            if not streams:
                streams.append(x)
            for sublayer in mine:
                x = self._sublayer(x, sublayer, memory)
                streams.append(x)
            final = self._norm(x) if self.shape.final_norm else x
        return streams, final

    def _normal(self, std: float, *size: int) -> torch.Tensor:
        return std * torch.randn(size, generator=self.generator)

    def _embed(self, length: int) -> torch.Tensor:
        b, embedding = self.sequences, self.embedding
        ids = torch.multinomial(self.probabilities, b * length, replacement=True, generator=self.generator)
        x = self.table[ids].view(b, length, -1)
        if embedding.position_std is not None:
            x = x + self._positions(length)
        if embedding.tokentype_std is not None:
            cut = torch.rand((b, 1, 1), generator=self.generator) if embedding.same_type_probability < 1.0 else torch.ones(b, 1,
                1)
            second = (torch.arange(length).view(1, -1, 1) / length > cut).float()
            types = self._normal(embedding.tokentype_std, 2, x.shape[-1])
            x = x + types[0] * (1.0 - second) + types[1] * second
        if embedding.norm_gain is not None:
            x = embedding.norm_gain * self._norm(x)
        return self._dropout(x)

    def _positions(self, length: int) -> torch.Tensor:
        d, std = self.shape.hidden_size, self.embedding.position_std
        if not self.embedding.sinusoidal:
            return self._normal(std, length, d)
        angle = torch.outer(torch.arange(length).float(), 10000.0 ** (-torch.arange(0, d, 2) / d))
        return std * math.sqrt(2.0) * torch.cat([angle.sin(), angle.cos()], 1)

    def _dropout(self, x: torch.Tensor) -> torch.Tensor:
        p = self.shape.dropout
        return x if p == 0.0 else x * (torch.rand(x.shape, generator=self.generator) >= p) / (1.0 - p)

    def _norm(self, x: torch.Tensor) -> torch.Tensor:
        if self.shape.normalization == "RMSNorm":
            return x * (x.square().mean(-1, keepdim=True) + self.shape.eps).rsqrt()
        return F.layer_norm(x, x.shape[-1:], eps=self.shape.eps)

    def _sublayer(self, x: torch.Tensor, sublayer: Sublayer, memory: torch.Tensor | None) -> torch.Tensor:
        inputs = sublayer.norm_scale * self._norm(x) if self.shape.inner_norm else x
        if sublayer.kind == "ffn":
            branch = self._ffn(inputs, sublayer)
        else:
            cross = sublayer.kind == "cross_attention"
            branch = self._attention(inputs, memory if cross else inputs, sublayer, sublayer.stack == "decoder" and not cross,
                cross)
        y = sublayer.residual_scale * x + sublayer.branch_scale * self._dropout(branch)
        return self._norm(y) if self.shape.outer_norm else y

    def _ffn(self, x: torch.Tensor, sublayer: Sublayer) -> torch.Tensor:
        shape, std = self.shape, sublayer.weight_std
        width = shape.ffn_hidden_size * (2 if shape.activation in ("swiglu", "geglu") else 1)
        inner = ACTIVATIONS[shape.activation](x @ self._normal(std["fc1"], shape.hidden_size, width))
        return inner @ self._normal(std["fc2"], shape.ffn_hidden_size, shape.hidden_size)

    def _attention(self, x: torch.Tensor, keys: torch.Tensor, sublayer: Sublayer, causal: bool, cross: bool) -> torch.Tensor:
        shape, std = self.shape, sublayer.weight_std
        d, c = shape.hidden_size, shape.head_dim

        def project(source: torch.Tensor, heads: int, role: str) -> torch.Tensor:
            return (source @ self._normal(std[role], d, heads * c)).unflatten(-1, (heads, c)).transpose(1, 2)   # [b, h, n, c]

        repeat = shape.num_heads // shape.num_query_groups
        query, key = project(x, shape.num_heads, "query"), project(keys, shape.num_query_groups, "key")
        value = project(keys, shape.num_query_groups, "value").repeat_interleave(repeat, 1)
        if shape.qk_norm:
            query, key = F.layer_norm(query, (c,)), F.layer_norm(key, (c,))
        if shape.rotary_base is not None and not cross:
            query, key = _rotated(query, shape.rotary_base), _rotated(key, shape.rotary_base)
        scores = query @ key.repeat_interleave(repeat, 1).transpose(-1, -2) / math.sqrt(c)
        if shape.attention_softcap:
            scores = shape.attention_softcap * torch.tanh(scores / shape.attention_softcap)
        if causal:
            scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -torch.inf)
        p = scores.softmax(-1)
        if shape.attention_dropout:
            p = p * (torch.rand(p.shape, generator=self.generator) >= shape.attention_dropout) / (1.0 - shape.attention_dropout)
        return (p @ value).transpose(1, 2).flatten(2) @ self._normal(std["attention_output"], shape.num_heads * c, d)


def _rotated(x: torch.Tensor, base: float) -> torch.Tensor:
    """Rotary positions on [b, h, n, c], halves paired."""
    half = x.shape[-1] // 2
    angle = torch.outer(torch.arange(x.shape[-2]).float(), base ** (-torch.arange(half) / half))
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * angle.cos() - second * angle.sin(), first * angle.sin() + second * angle.cos()], -1)
