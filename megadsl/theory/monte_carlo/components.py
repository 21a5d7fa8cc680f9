"""The sampler: every component in plain torch on random inputs, weights and gradients, measured as the formulas state it.

Inputs x_t = mu + s (sqrt(r) z + sqrt(1-r) e_t) have Gaussian coordinates with
correlation r between tokens (two tokens for r < 0, eight otherwise where the number does not matter); gradients likewise. Each
draw has its own weights, and gives one estimate of every moment; their spread over draws gives the standard error.

Shape letters: b draws, n tokens, d features, h heads, g key/value heads, c head size, m memory tokens.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from megadsl.theory.contract import Arguments, checked, head_layout, std_or_default

QUANTITIES = ("mean", "second_moment", "covariance", "gradient_second_moment", "gradient_covariance")
ACTIVATIONS = {
    "relu": F.relu, "gelu": F.gelu, "tanh_gelu": lambda x: F.gelu(x, approximate="tanh"), "silu": F.silu,
    "squared_relu": lambda x: F.relu(x).square(),
    "swiglu": lambda x: F.silu(x.chunk(2, -1)[0]) * x.chunk(2, -1)[1],
    "geglu": lambda x: F.gelu(x.chunk(2, -1)[0]) * x.chunk(2, -1)[1],
}


PAIRED_TOKENS = 8


@dataclass(frozen=True)
class Measurement:
    """Sampled moments: value and standard error by quantity; per position where asked for."""

    value: dict[str, float]
    standard_error: dict[str, float]
    per_position: dict[str, list[float]]


def sample_component(name: str, draws: int, seed: int, **values) -> Measurement:
    """Measure component `name` over `draws` independent weights and inputs (keys as in `megadsl.theory.component`)."""
    arguments = checked(values)
    generator = torch.Generator().manual_seed(seed)
    rows: dict[str, list[torch.Tensor]] = {}
    positions: list[torch.Tensor] = []
    batch = max(1, min(draws, int(4e6 / _work(name, arguments))))
    done = 0
    while done < draws:
        size = min(batch, draws - done)
        outcome = _run(name, arguments, size, generator)
        for quantity, estimate in outcome[0].items():
            rows.setdefault(quantity, []).append(estimate)
        positions.append(outcome[1])
        done += size
    joined = {quantity: torch.cat(parts).double() for quantity, parts in rows.items()}
    by_position = torch.cat(positions).double().mean(0)
    return Measurement(
        {quantity: float(estimates.mean()) for quantity, estimates in joined.items()},
        {quantity: float(estimates.std() / math.sqrt(len(estimates))) for quantity, estimates in joined.items()},
        {"second_moment": by_position[0].tolist(), "gradient_second_moment": by_position[1].tolist()},
    )


def tokens(shape: tuple[int, int, int], mean: float, variance: float, correlation: float,
        generator: torch.Generator) -> torch.Tensor:
    """[b, n, d] Gaussian tokens of the given moments."""
    own = torch.randn(shape, generator=generator)
    if correlation >= 0:
        shared = torch.randn((shape[0], 1, shape[2]), generator=generator)
        mixed = math.sqrt(correlation) * shared + math.sqrt(1.0 - correlation) * own
    else:
        assert shape[1] == 2, "negative correlations are sampled on pairs"
        mixed = torch.stack([own[:, 0], correlation * own[:, 0] + math.sqrt(1.0 - correlation ** 2) * own[:, 1]], 1)
    return mean + math.sqrt(variance) * mixed


def _work(name: str, a: Arguments) -> float:
    if name in ("attention", "cross_attention"):
        return a.length * (a.in_features + max(a.length, a.memory_length or 0) * (a.num_heads or 1)) + 4.0 * a.in_features ** 2
    if name == "linear":
        return a.in_features * (a.out_features or a.in_features)
    if name == "ffn":
        return 12.0 * a.in_features ** 2
    return 2.0 * PAIRED_TOKENS * a.in_features


def _run(name: str, a: Arguments, b: int, generator: torch.Generator) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    attention = name in ("attention", "cross_attention")
    # Pairs of tokens are enough; more of them tell a small covariance from zero.
    n = a.length if attention else 2 if a.correlation < 0 else PAIRED_TOKENS
    width = {"softmax": 1, "swiglu": 2 * a.in_features, "geglu": 2 * a.in_features}.get(name, a.in_features)
    if name == "softmax":
        n = a.length
    x = tokens((b, n, width), a.mean, a.variance, a.correlation, generator).requires_grad_()
    memory = None
    if name == "cross_attention":
        memory_r = a.correlation if a.memory_correlation is None else a.memory_correlation
        memory = tokens((b, a.memory_length or a.length, width), a.mean, a.variance, memory_r, generator).requires_grad_()
    y = _forward(name, a, x, memory, generator)
    g = tokens(tuple(y.shape), 0.0, a.gradient_variance, a.gradient_correlation, generator)
    y.backward(g)
    estimates = {"mean": y.mean((1, 2)), **_moments("", y), **_moments("gradient_", x.grad)}
    if memory is not None:
        estimates.update(_moments("memory_gradient_", memory.grad))
    per_position = torch.stack([y.square().mean(-1), x.grad.square().mean(-1)], 1)
    return {key: value.detach() for key, value in estimates.items()}, per_position.detach()


def _moments(prefix: str, x: torch.Tensor) -> dict[str, torch.Tensor]:
    n, d = x.shape[1:]
    squares = x.square().sum((1, 2))
    total = x.sum(1).square().sum(1)
    return {f"{prefix}second_moment": squares / (n * d), f"{prefix}covariance": (total - squares) / (max(n * (n - 1), 1) * d)}


def _forward(name: str, a: Arguments, x: torch.Tensor, memory: torch.Tensor | None, generator: torch.Generator) -> torch.Tensor:
    b, d = x.shape[0], a.in_features
    if name in ACTIVATIONS:
        return ACTIVATIONS[name](x)
    if name == "dropout":
        return _dropout(x, 0.1 if a.dropout is None else a.dropout, generator)
    if name == "layernorm":
        return F.layer_norm(x, (d,), eps=a.eps)
    if name == "rmsnorm":
        return x * (x.square().mean(-1, keepdim=True) + a.eps).rsqrt()
    if name == "softmax":
        return x.softmax(1)
    if name == "linear":
        return x @ _matrix((b, d, a.out_features or d), std_or_default(a.weight_std, d), generator)
    if name == "ffn":
        hidden = a.ffn_hidden_size or 4 * d
        gated = a.activation in ("swiglu", "geglu")
        inner = x @ _matrix((b, d, hidden * (2 if gated else 1)), std_or_default(a.fc1_std, d, a.weight_std), generator)
        out = _matrix((b, hidden, a.out_features or d), std_or_default(a.fc2_std, hidden, a.weight_std), generator)
        return _dropout(ACTIVATIONS[a.activation](inner) @ out, a.dropout or 0.0, generator)
    return _attention(a, x, x if memory is None else memory, generator)


def _attention(a: Arguments, x: torch.Tensor, memory: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    b, d = x.shape[0], a.in_features
    heads, groups, size = head_layout(a)

    def project(source: torch.Tensor, count: int, std: float | None) -> torch.Tensor:
        weight = _matrix((b, d, count * size), std_or_default(std, d, a.weight_std), generator)
        return (source @ weight).unflatten(-1, (count, size)).transpose(1, 2)                # [b, h or g, n, c]

    query = project(x, heads, a.query_std)
    key, value = (project(memory, groups, std).repeat_interleave(heads // groups, 1) for std in (a.key_std, a.value_std))
    scores = query @ key.transpose(-1, -2) / math.sqrt(size)
    if a.attention_softcap:
        scores = a.attention_softcap * torch.tanh(scores / a.attention_softcap)
    if a.mask == "causal" and memory is x:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -torch.inf)
    mixed = (_dropout(scores.softmax(-1), a.attention_dropout, generator) @ value).transpose(1, 2).flatten(2)
    if not a.output_projection:
        return mixed
    weight = _matrix((b, heads * size, a.out_features or d), std_or_default(a.output_std, heads * size, a.weight_std), generator)
    return _dropout(mixed @ weight, a.dropout or 0.0, generator)


def _matrix(shape: tuple[int, ...], std: float, generator: torch.Generator) -> torch.Tensor:
    return std * torch.randn(shape, generator=generator)


def _dropout(x: torch.Tensor, p: float, generator: torch.Generator) -> torch.Tensor:
    if p == 0.0:
        return x
    return x * (torch.rand(x.shape, generator=generator) >= p) / (1.0 - p)
