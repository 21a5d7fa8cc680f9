"""`component(NAME, key=value...)`: one entry for all components, with the keys and the JSON that other programs rely on.

Every key has a default and every NAME takes every key; those that a component does not depend on are listed as `ignored`.
Defaults that follow from others: out_features = in_features, weights of std fan_in^-1/2 (so that a linear map keeps the second
moment), memory_length = length, memory_correlation = correlation, head_dim = in_features / num_heads, num_query_groups =
num_heads, ffn_hidden_size = 4 in_features.
"""

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass

import numpy as np

from megadsl.errors import UserError
from megadsl.theory import components
from megadsl.theory.attention import AttentionShape, AttentionSignal
from megadsl.theory.components import Moments, Signal
from megadsl.theory.grid import Gram, Grid, Mask, causal_grid, means, uniform_grid
from megadsl.theory.quadrature import ACTIVATIONS

NAMES = ("linear", "dropout", "relu", "gelu", "silu", "tanh_gelu", "squared_relu", "swiglu", "geglu", "layernorm", "rmsnorm",
         "softmax", "attention", "cross_attention", "ffn")
# Up to this length a causal component keeps every position; beyond it blocks of 2 % (0.1 % of error).
EXACT_LENGTH = 512


@dataclass(frozen=True)
class Arguments:
    """The keys of `megadsl theory component`; None: derived (module docstring)."""

    mean: float = 0.0
    variance: float = 1.0
    correlation: float = 0.0
    gradient_variance: float = 1.0
    gradient_correlation: float = 0.0
    in_features: int = 256
    out_features: int | None = None
    weight_std: float | None = None
    query_std: float | None = None
    key_std: float | None = None
    value_std: float | None = None
    output_std: float | None = None
    fc1_std: float | None = None
    fc2_std: float | None = None
    ffn_hidden_size: int | None = None
    activation: str = "gelu"
    dropout: float | None = None
    attention_dropout: float = 0.0
    attention_softcap: float = 0.0
    length: int = 128
    memory_length: int | None = None
    memory_correlation: float | None = None
    num_heads: int | None = None
    num_query_groups: int | None = None
    head_dim: int | None = None
    mask: str = "bidirectional"
    output_projection: bool = True
    eps: float = 1e-5

    @property
    def signal(self) -> Signal:
        return Signal(self.mean, self.variance, self.correlation, self.gradient_variance, self.gradient_correlation)


_POSITIVE = ("in_features", "out_features", "ffn_hidden_size", "length", "memory_length", "num_heads", "num_query_groups",
    "head_dim")
_NOT_NEGATIVE = ("gradient_variance", "weight_std", "query_std", "key_std", "value_std", "output_std", "fc1_std", "fc2_std",
    "eps", "attention_softcap")
_CORRELATIONS = ("correlation", "gradient_correlation", "memory_correlation")
_PROBABILITIES = ("dropout", "attention_dropout")
_SIGNAL = ("mean", "variance", "correlation", "gradient_variance", "gradient_correlation")
_ATTENTION = (*_SIGNAL, "in_features", "out_features", "weight_std", "query_std", "key_std", "value_std", "output_std", "dropout",
              "attention_dropout", "length", "num_heads", "num_query_groups", "head_dim", "output_projection", "attention_softcap")
USED = {
    "linear": (*_SIGNAL, "in_features", "out_features", "weight_std"),
    "dropout": (*_SIGNAL, "dropout"),
    **{name: _SIGNAL for name in ACTIVATIONS},
    "layernorm": (*_SIGNAL, "in_features", "eps"),
    "rmsnorm": (*_SIGNAL, "in_features", "eps"),
    "softmax": (*_SIGNAL, "length"),
    "attention": (*_ATTENTION, "mask"),
    "cross_attention": (*_ATTENTION, "memory_length", "memory_correlation"),
    "ffn": (*_SIGNAL, "in_features", "out_features", "ffn_hidden_size", "weight_std", "fc1_std", "fc2_std", "activation",
        "dropout"),
}


def component(name: str, **values) -> Moments:
    """Moments of component `name` (one of NAMES); keys as in `Arguments`.

    Raises:
        UserError: an unknown name or key, or a value outside its range.
    """
    _known(name, NAMES, "component")
    arguments = checked(values)
    if name in ("softmax", "attention", "cross_attention"):
        _possible(arguments, name == "cross_attention")
    match name:
        case "linear":
            return components.linear(arguments.signal, arguments.in_features, arguments.out_features or arguments.in_features,
                                     std_or_default(arguments.weight_std, arguments.in_features))
        case "dropout":
            return components.dropout(arguments.signal, 0.1 if arguments.dropout is None else arguments.dropout)
        case "layernorm":
            return components.layernorm(arguments.signal, arguments.in_features, arguments.eps)
        case "rmsnorm":
            return components.rmsnorm(arguments.signal, arguments.in_features, arguments.eps)
        case "softmax":
            return components.softmax(arguments.signal, arguments.length)
        case "ffn":
            return _ffn(arguments)
        case "attention" | "cross_attention":
            return _attention(arguments, name == "cross_attention")
    return components.activation(arguments.signal, name)


def _possible(arguments: Arguments, cross: bool) -> None:
    """n tokens of one common correlation exist only from -1/(n-1) on."""
    memory = arguments.memory_length or arguments.length
    checks = [("correlation", arguments.correlation, arguments.length),
              ("gradient_correlation", arguments.gradient_correlation, arguments.length)]
    if cross:
        r = arguments.correlation if arguments.memory_correlation is None else arguments.memory_correlation
        checks.append(("memory_correlation", r, memory))
    for key, r, length in checks:
        if length > 1 and r < -1.0 / (length - 1) - 1e-12:
            raise UserError(f"{key} {r} is impossible: {length} tokens can have a common correlation of "
                            f"{-1.0 / (length - 1):.4g} at least.")


def component_json(name: str, texts: Mapping[str, str]) -> dict:
    """The contract's object for keys and values given as text."""
    _known(name, NAMES, "component")
    values = {key: _parsed(key, text) for key, text in texts.items()}
    try:
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            moments = component(name, **values)
        finite = all(np.isfinite(value).all() for value in _numbers(asdict(moments)))
    except (OverflowError, ZeroDivisionError):
        finite = False
    if not finite:
        raise UserError(f"The moments of {name} are beyond double precision for {', '.join(texts) or 'these values'}; use smaller ones.")
    result = {"component": name, **asdict(moments)}
    result.update(result.pop("extra"))
    result["per_position"] = result.pop("per_position")
    result["ignored"] = sorted(set(texts) - set(USED[name]))
    return result


def _numbers(value) -> Iterator:
    if isinstance(value, dict):
        for item in value.values():
            yield from _numbers(item)
    elif not isinstance(value, str) and value is not None:
        yield np.asarray(value, dtype=float)


def _parsed(key: str, text: str):
    field = Arguments.__dataclass_fields__.get(key)
    if field is None:
        _known(key, Arguments.__dataclass_fields__, "key")
    kind = str(field.type)
    try:
        if "bool" in kind:
            return {"true": True, "false": False, "1": True, "0": False, "yes": True, "no": False}[text.lower()]
        if "int" in kind:
            return int(text)
        return float(text) if "float" in kind else text
    except (ValueError, KeyError) as error:
        expected = "true or false" if "bool" in kind else "a whole number" if "int" in kind else "a number"
        raise UserError(f"{key} must be {expected}, not '{text}'.") from error


def _known(name: str, known, what: str) -> None:
    if name not in known:
        near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.0)[0]
        raise UserError(f"There is no {what} '{name}'; did you mean {near}? (known: {', '.join(known)})")


def checked(values: dict) -> Arguments:
    """`Arguments` of the given keys; UserError for an unknown key or a value outside its range."""
    for key in values:
        _known(key, Arguments.__dataclass_fields__, "key")
    arguments = Arguments(**values)
    given = {key: value for key, value in asdict(arguments).items() if value is not None}
    for key, value in given.items():
        if isinstance(value, float) and not np.isfinite(value):
            raise UserError(f"{key} must be a finite number, not {value}.")
    rules = (
        (_POSITIVE, lambda value: value >= 1, "at least 1"),
        (_NOT_NEGATIVE, lambda value: value >= 0, "0 or more"),
        (("variance",), lambda value: value > 0, "larger than 0"),
        (_CORRELATIONS, lambda value: -1 <= value <= 1, "between -1 and 1"),
        (_PROBABILITIES, lambda value: 0 <= value < 1, "at least 0 and below 1"),
        (("mask",), lambda value: value in ("bidirectional", "causal"), "bidirectional or causal"),
        (("activation",), lambda value: value in ACTIVATIONS, "one of " + ", ".join(ACTIVATIONS)),
    )
    for keys, holds, wanted in rules:
        for key in keys:
            if key in given and not holds(given[key]):
                raise UserError(f"{key} must be {wanted}, not {given[key]}.")
    return arguments


def std_or_default(given: float | None, fan_in: int, general: float | None = None) -> float:
    if given is not None:
        return given
    return general if general is not None else fan_in ** -0.5


def _ffn(arguments: Arguments) -> Moments:
    width, hidden = arguments.in_features, arguments.ffn_hidden_size or 4 * arguments.in_features
    return components.ffn(
        arguments.signal, arguments.activation, width, hidden, arguments.out_features or width,
        std_or_default(arguments.fc1_std, width, arguments.weight_std),
        std_or_default(arguments.fc2_std, hidden, arguments.weight_std),
        arguments.dropout or 0.0,
    )


def head_layout(arguments: Arguments) -> tuple[int, int, int]:
    """(heads, key/value heads, head size)."""
    width = arguments.in_features
    heads = arguments.num_heads
    if heads is None:
        heads = width // arguments.head_dim if arguments.head_dim and width % arguments.head_dim == 0 else 1
    size = arguments.head_dim
    if size is None:
        if width % heads:
            raise UserError(f"in_features {width} is not divisible by num_heads {heads}; give head_dim.")
        size = width // heads
    groups = arguments.num_query_groups or heads
    if heads % groups:
        raise UserError(f"num_heads {heads} is not divisible by num_query_groups {groups}.")
    return heads, groups, size


def _attention(arguments: Arguments, cross: bool) -> Moments:
    signal, width = arguments.signal, arguments.in_features
    heads, _, size = head_layout(arguments)
    causal = arguments.mask == "causal" and not cross
    if causal:
        grid = causal_grid(arguments.length, 0.0 if arguments.length <= EXACT_LENGTH else 0.02, 64)
    else:
        grid = uniform_grid(arguments.length)
    memory = uniform_grid(arguments.memory_length or arguments.length) if cross else grid
    memory_r = signal.correlation if arguments.memory_correlation is None else arguments.memory_correlation
    queries = _exchangeable(grid, signal.second_moment, signal.overlap)
    keys = _exchangeable(memory, signal.second_moment, signal.mean ** 2 + memory_r * signal.variance) if cross else queries

    general = arguments.weight_std
    kappa = (width * std_or_default(arguments.query_std, width, general) * std_or_default(arguments.key_std, width, general)) ** 2
    value = std_or_default(arguments.value_std, width, general)
    shape = AttentionShape(width, size, arguments.attention_dropout, softcap=arguments.attention_softcap)
    attention = AttentionSignal(shape, Mask(grid, memory, causal), kappa,
        queries, keys)
    if arguments.output_projection:
        std = std_or_default(arguments.output_std, heads * size, general)
        forward = width * value ** 2 * heads * size * std ** 2
        backward = heads * size * value ** 2 * (arguments.out_features or width) * std ** 2
    else:
        forward, backward = width * value ** 2, heads * size * value ** 2
    keep = 1.0 - (arguments.dropout or 0.0)
    output = Gram(forward * attention.output.off, forward * attention.output.diag / keep)
    at_queries, at_keys = attention.backward(_exchangeable(grid, signal.gradient_variance / keep, signal.gradient_overlap))
    gradient = at_queries if cross else at_queries.plus(at_keys, 1.0, 1.0)
    gradient = Gram(backward * gradient.off, backward * gradient.diag)
    extra = {}
    if cross:
        second, overlap = means(memory, at_keys)
        extra = {"memory_gradient_second_moment": backward * second, "memory_gradient_covariance": backward * overlap}
    per_position = _per_position(grid, output, gradient) if causal else {}
    return Moments(0.0, *means(grid, output), *means(grid, gradient), extra, per_position)


def _exchangeable(grid: Grid, second_moment: float, overlap: float) -> Gram:
    blocks = len(grid.sizes)
    return Gram(np.full((blocks, blocks), overlap), np.full(blocks, second_moment))


def _per_position(grid: Grid, output: Gram, gradient: Gram) -> dict[str, list[float]]:
    def others(gram: Gram) -> np.ndarray:
        # Mean overlap of a position with all others.
        sums = gram.off @ grid.sizes - np.diagonal(gram.off)
        return sums / max(grid.length - 1, 1)

    return {
        "second_moment": grid.spread(output.diag).tolist(), "covariance": grid.spread(others(output)).tolist(),
        "gradient_second_moment": grid.spread(gradient.diag).tolist(),
        "gradient_covariance": grid.spread(others(gradient)).tolist(),
    }
