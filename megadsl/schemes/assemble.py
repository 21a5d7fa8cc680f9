"""What all schemes share: the configuration as the theory's ModelShape, the list of residual additions, and the finished
SignalPlan."""

import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Literal

from megadsl.config.model import ModelConfig
from megadsl.schemes.plan import (
    ATTENTION_ROLES, FFN_ROLES, EmbeddingPlan, Gate, HeadPlan, Kind, NormPosition, SignalPlan, StackName, StreamPrediction,
    SublayerPlan,
)
from megadsl.theory.inputs import TokenStatistics
from megadsl.theory.profile import DepthProfile, propagate
from megadsl.theory.shape import Embedding, Head, ModelShape, Sublayer


def model_shape(model: ModelConfig, norm_position: NormPosition | None = None) -> ModelShape:
    """The part of the configuration that the signal at initialisation depends on; a scheme may move the norms."""
    return ModelShape(
        hidden_size=model.hidden_size, ffn_hidden_size=model.ffn_size, num_heads=model.num_attention_heads,
        num_query_groups=model.query_groups, head_dim=model.head_dim, length=model.seq_length, family=model.family,
        norm_position=norm_position or model.norm_position, target_length=model.target_length, activation=model.activation,
        normalization=model.normalization, eps=model.layernorm_epsilon, dropout=model.hidden_dropout,
        attention_dropout=model.attention_dropout,
        rotary_base=model.rotary_base if model.position_embedding_type == "rope" else None, qk_norm=model.qk_layernorm,
        attention_softcap=model.attention_logit_softcap,
    )


def additions(model: ModelConfig) -> Iterator[tuple[StackName, int, Kind]]:
    """(stack, layer, kind) of every residual addition in forward order."""
    for number, (stack, layers) in enumerate(model.stack_layers.items()):
        for layer in range(layers):
            yield stack, layer, "self_attention"
            if number:  # a stack behind another attends to it
                yield stack, layer, "cross_attention"
            yield stack, layer, "ffn"


def stack_layers(model: ModelConfig, stack: StackName) -> int:
    """Layers of one stack."""
    return model.stack_layers[stack]


def num_additions(model: ModelConfig) -> dict[str, int]:
    """S by stack: 2 per layer, 3 per decoder layer of an encoder_decoder (THEORY.md, section 8)."""
    return dict(Counter(stack for stack, _, _ in additions(model)))


def embedding_tables(model: ModelConfig, std: float | Callable[[str], float]) -> dict[str, float]:
    """std by role for the tables that the model has; a sinusoidal position is scaled like a table."""
    roles = ["word_embedding"]
    if model.position_embedding_type in ("learned_absolute", "sinusoidal"):
        roles.append("position_embedding")
    if model.num_tokentypes:
        roles.append("tokentype_embedding")
    return {role: std(role) if callable(std) else std for role in roles}


def head_plan(model: ModelConfig, hidden_scale: float, output_std: float, dense_std: float) -> HeadPlan:
    """A head with the matrices that the model has: BERT's transform in an encoder, the output matrix where it is not tied."""
    stds = {"head_dense": dense_std} if model.family == "encoder" else {}
    if model.untie_embeddings_and_output_weights:
        stds["output_head"] = output_std
    return HeadPlan(hidden_scale, stds)


def equal_stds(kind: Kind, std: float) -> dict[str, float]:
    """The same std for all matrices of a branch."""
    return dict.fromkeys(FFN_ROLES if kind == "ffn" else ATTENTION_ROLES, std)


def glorot(fan_in: int, fan_out: int) -> float:
    """Standard deviation of the Glorot (Xavier) normal initialisation."""
    return math.sqrt(2.0 / (fan_in + fan_out))


@dataclass(frozen=True)
class Parametrization:
    """What a scheme decides; stds that are None in `sublayers` are left to the theory (unit branches).

    `norm_position` None: the model's. `embedding_gain` is that of the norm on the embedding sum, for models that have one.
    `unit_tables`: `tables` are chosen for the second moment of what they add to the stream, so where vectors are projected instead
    of words looked up the projection's std is word_embedding / sqrt(gain of the projection); else they are stds whatever comes in.
    """

    scheme: str
    tables: dict[str, float]
    sublayers: list[Sublayer]
    head: HeadPlan
    norm_position: NormPosition | None = None
    gate: Gate = "fixed"
    embedding_gain: float = 1.0
    role_factors: dict[str, dict[str, float]] = field(default_factory=dict)
    unit_tables: bool = False


def assemble(parametrization: Parametrization, model: ModelConfig, statistics: TokenStatistics, vocab_size: int,
             level: Literal["matrix", "scalar"] = "matrix") -> SignalPlan:
    """Predict the signal of a parametrization, which fills in the open stds, and put it all into a plan."""
    profile = profile_of(parametrization, model, statistics, vocab_size, level)
    return SignalPlan(
        scheme=parametrization.scheme, family=model.family, norm_position=parametrization.norm_position or model.norm_position,
        embedding=EmbeddingPlan(*profile.embedding.values(), weight_std=_input_stds(parametrization, statistics),
                                norm_gain=parametrization.embedding_gain if model.embedding_layernorm else None),
        sublayers=tuple(
            SublayerPlan(*prediction.values(), layer=sublayer.layer, stack=sublayer.stack, kind=sublayer.kind,
                         residual_scale=sublayer.residual_scale, branch_scale=sublayer.branch_scale,
                         weight_std=dict(sublayer.weight_std), norm_scale=sublayer.norm_scale, gate=parametrization.gate)
            for sublayer, prediction in zip(profile.sublayers, profile.predictions, strict=True)
        ),
        head=_head_of(parametrization, statistics), final=StreamPrediction(*profile.final.values()), role_factors=parametrization.role_factors,
    )


def profile_of(parametrization: Parametrization, model: ModelConfig, statistics: TokenStatistics, vocab_size: int,
               level: Literal["matrix", "scalar"] = "matrix") -> DepthProfile:
    """The theory's DepthProfile of a parametrization."""
    # Logits are linear in the head's input, whose second moment is 1.
    head_std = parametrization.head.weight_std.get("output_head", parametrization.tables["word_embedding"])
    head = Head(model.hidden_size * (head_std * parametrization.head.hidden_scale) ** 2, parametrization.head.weight_std.get("head_dense"),
                (statistics.target or statistics).repeats, statistics.masking_probability, statistics.z_loss, statistics.label_smoothing)
    shape = _with_lengths(model_shape(model, parametrization.norm_position), statistics)
    target = statistics.target and embedding_of(parametrization, model, statistics.target)
    return propagate(shape, embedding_of(parametrization, model, statistics), parametrization.sublayers, vocab_size, level, head,
                     statistics.gradient_correlation, statistics.read_position, target)


def _with_lengths(shape: ModelShape, statistics: TokenStatistics) -> ModelShape:
    """The shape at the lengths that sequences really have; padding takes no part in the signal."""
    if statistics.length:
        shape = replace(shape, length=max(1, round(statistics.length)))
    if statistics.target and statistics.target.length:
        shape = replace(shape, target_length=max(1, round(statistics.target.length)))
    return shape


def _input_stds(parametrization: Parametrization, statistics: TokenStatistics) -> dict[str, float]:
    """std by role of the input layer's weights."""
    if statistics.projected_size is None:
        return parametrization.tables
    scale = statistics.content_gain ** -0.5 if parametrization.unit_tables else 1.0
    tables = dict(parametrization.tables)
    words = tables.pop("word_embedding")
    inner = {} if statistics.inner_projection_std is None else {"inner_projection": statistics.inner_projection_std}
    token = {"class_token": scale * words * statistics.content_gain ** 0.5} if statistics.class_token else {}
    return {**inner, "input_projection": scale * words, **token, **({"word_embedding": words} if statistics.target else {}), **tables}


def _head_of(parametrization: Parametrization, statistics: TokenStatistics) -> HeadPlan:
    """The head's numbers; BERT's transform stands in front of a language model's logits only."""
    head = parametrization.head
    if statistics.gradient_correlation is None:
        return head
    return HeadPlan(head.hidden_scale, {role: std for role, std in head.weight_std.items() if role != "head_dense"})


def embedding_of(parametrization: Parametrization, model: ModelConfig, statistics: TokenStatistics) -> Embedding:
    """The theory's embedding of a parametrization."""
    tables, same_type = parametrization.tables, statistics.same_type_probability
    if same_type is None:
        same_type = 1.0 if model.num_tokentypes == 1 else 2.0 / 3.0
    scale = 1.0 if parametrization.unit_tables else statistics.content_gain ** 0.5
    return Embedding(
        word_std=scale * tables["word_embedding"], position_std=tables.get("position_embedding"),
        tokentype_std=tables.get("tokentype_embedding"), repeat_probability=statistics.input_repeats,
        same_type_probability=same_type, sinusoidal=model.position_embedding_type == "sinusoidal",
        norm_gain=parametrization.embedding_gain if model.embedding_layernorm else None, positions=statistics.positions,
        spread=statistics.spread,
    )
