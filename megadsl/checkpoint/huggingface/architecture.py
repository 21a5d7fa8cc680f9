"""What a mapping file says of its architecture, and the vocabulary that they share: activations, special ids, refusals."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from megadsl.checkpoint.huggingface.mapping import TensorMap
from megadsl.config.model import ModelConfig
from megadsl.data.tokenizer import Tokenizer
from megadsl.errors import UserError

# Our activation -> transformers' name of the same function; a gated unit goes by what is inside.
ACTIVATIONS = {
    "relu": "relu", "gelu": "gelu", "tanh_gelu": "gelu_new", "silu": "silu", "squared_relu": "relu2", "swiglu": "silu", "geglu": "gelu",
}
_NAMES_OF_THEIRS = {
    "gelu_python": "gelu", "gelu_pytorch_tanh": "tanh_gelu", "gelu_fast": "tanh_gelu", "swish": "silu",
    **{theirs: ours for ours, theirs in ACTIVATIONS.items() if ours not in ("swiglu", "geglu")},
}


@dataclass(frozen=True)
class Architecture:
    """A model class of transformers.

    Attributes:
        name: the class.
        model_type: transformers' key of its configuration.
        takes: field of the model section -> values that the class can express.
        settings: model section -> keys of config.json.
        tensors: fills a TensorMap with the class's rules (settings are given, so that an import can be told apart).
        section: config.json -> our model section (inverse of `settings`).
        biases: model section -> whether its linears have biases.
        grouped_queries: whether it can have fewer key heads than query heads.
        free_head_size: whether a head can be other than hidden_size / num_attention_heads.
        fixed_epsilon: the class's own, where it cannot be set.
    """

    name: str
    model_type: str
    takes: dict[str, tuple]
    settings: Callable[[ModelConfig], dict]
    tensors: Callable[[TensorMap, dict], None]
    section: Callable[[dict], dict]
    biases: Callable[[ModelConfig], bool] = lambda model: True
    grouped_queries: bool = False
    free_head_size: bool = False
    fixed_epsilon: float | None = None

    def refusals(self, model: ModelConfig) -> Iterator[str]:
        """A sentence for every part of the model that the class has no place for, with what it has instead."""
        takes = {"attention_logit_softcap": (0.0,), **self.takes}  # none of the classes caps scores
        has = {key: allowed for key, allowed in takes.items() if getattr(model, key) not in allowed}
        if model.query_groups != model.num_attention_heads and not self.grouped_queries:
            has["num_query_groups"] = (model.num_attention_heads,)
        if model.head_dim * model.num_attention_heads != model.hidden_size and not self.free_head_size:
            has["kv_channels"] = (model.hidden_size // model.num_attention_heads,)
        if self.fixed_epsilon is not None and model.layernorm_epsilon != self.fixed_epsilon:
            has["layernorm_epsilon"] = (self.fixed_epsilon,)
        for key, allowed in has.items():
            yield f"model.{key}={_yaml(getattr(model, key))} has no place in {self.name}, which has {' or '.join(map(_yaml, allowed))}"

    def require(self, model: ModelConfig) -> None:
        """UserError with all refusals."""
        reasons = list(self.refusals(model))
        if reasons:
            raise UserError(f"This model cannot be written as {self.name}: {'; '.join(reasons)}.")


def _yaml(value) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def our_activation(theirs: str, gated: bool = False) -> str:
    """Our name of transformers' activation; UserError where we have none."""
    ours = _NAMES_OF_THEIRS.get(theirs)
    if gated:
        ours = {"silu": "swiglu", "gelu": "geglu"}.get(ours)
    if ours is None:
        raise UserError(f"The model's activation {theirs}{' (gated)' if gated else ''} has no counterpart here (model.activation).")
    return ours


def only(values: dict, **wanted) -> None:
    """UserError where config.json asks for something that we have not; `wanted` are the values that we have."""
    for key, value in wanted.items():
        if values.get(key, value) != value:
            raise UserError(f"config.json says {key}: {values[key]}, which has no counterpart here; only {value} can be imported.")


def special_ids(tokenizer: Tokenizer) -> dict[str, int]:
    """The tokenizer's ids as config.json names them; a foreign tokenizer may lack some."""
    names = {"pad": "pad_token_id", "bos": "bos_token_id", "eos": "eos_token_id", "sep": "sep_token_id", "cls": "cls_token_id"}
    return {names[name]: index for name, index in tokenizer.special_ids.items() if name in names}
