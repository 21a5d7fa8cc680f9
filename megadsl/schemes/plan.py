"""SignalPlan: every number of an initialisation scheme, and the signal that the theory predicts for it.

Convention, written here and nowhere else: **lambda (`residual_scale`) multiplies the skip, beta (`branch_scale`) multiplies
the branch**. Pre-LN: x + f(x) becomes lambda*x + beta*f(norm(x)); Post-LN: norm(lambda*x + beta*f(x)). For DSLM
lambda^2 + beta^2 = 1; every other scheme says itself what the two are.

Standard deviations are given by role. Roles of a sublayer: query, key, value, attention_output (attention), fc1, fc2 (ffn; fc1
serves gate and up of a gated unit alike). Roles of the embedding: word_embedding (or input_projection, where vectors come in
instead of words, behind an inner_projection where they take two steps, and class_token, where one stands in front of them),
position_embedding, tokentype_embedding.
Roles of the head: output_head, only where it is not tied; head_dense, only in an encoder (BERT's transform).

Predictions are per coordinate of the residual stream: forward_variance is the second moment, averaged over positions;
correlation is (mean overlap of two different positions) / forward_variance; gradient_variance is in units of the gradient
variance at the input of the LM head.
"""

import json
from dataclasses import asdict, dataclass, field
from typing import Literal

StackName = Literal["decoder", "encoder"]
Kind = Literal["self_attention", "cross_attention", "ffn"]
NormPosition = Literal["pre", "post", "both", "none"]
Gate = Literal["fixed", "scalar", "channel"]

ATTENTION_ROLES = ("query", "key", "value", "attention_output")
FFN_ROLES = ("fc1", "fc2")


@dataclass(frozen=True)
class StreamPrediction:
    """What the theory expects of the residual stream at one depth."""

    forward_variance: float
    correlation: float
    gradient_variance: float
    gradient_correlation: float


@dataclass(frozen=True)
class SublayerPlan(StreamPrediction):
    """One residual addition; the predictions hold for the stream right after it (after its norm in Post-LN).

    Attributes:
        norm_scale: fixed factor on the output of the norm in front of the branch.
        gate: what branch_scale is: a "fixed" number, a trained "scalar" that starts there, or a trained vector of one number a
            "channel" (hidden coordinate) that starts there.
    """

    layer: int
    stack: StackName
    kind: Kind
    residual_scale: float
    branch_scale: float
    weight_std: dict[str, float] = field(default_factory=dict)
    norm_scale: float = 1.0
    gate: Gate = "fixed"


@dataclass(frozen=True)
class EmbeddingPlan(StreamPrediction):
    """The embedding sum; the predictions hold right after it, norm and dropout included.

    Attributes:
        norm_gain: start of the gain of the norm between sum and dropout; None: no such norm.
    """

    weight_std: dict[str, float] = field(default_factory=dict)
    norm_gain: float | None = None


@dataclass(frozen=True)
class HeadPlan:
    """The LM head: logits = matrix @ (hidden_scale * h), h the normed hidden state; `weight_std` has no output_head where the
    matrix is tied.

    In an encoder h is norm(activation(dense @ hidden state)) instead, as in BERT, and the logits have a bias.
    """

    hidden_scale: float
    weight_std: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class SignalPlan:
    """A whole model under one scheme. `sublayers` stand in the order of the forward pass (encoder first), `final` is the head's
    input.

    Attributes:
        norm_position: of the residual additions: "pre", "post", "both" (Keel) or "none" (ReZero).
        role_factors: role of a parameter -> {"lr" | "eps" | "weight_decay": factor on the optimizer's number}; missing: 1.
    """

    scheme: str
    family: str
    norm_position: NormPosition
    embedding: EmbeddingPlan
    sublayers: tuple[SublayerPlan, ...]
    head: HeadPlan
    final: StreamPrediction
    role_factors: dict[str, dict[str, float]] = field(default_factory=dict)

    @property
    def stacks(self) -> tuple[str, ...]:
        """Names of the stacks, in forward order."""
        return tuple(dict.fromkeys(stack for stack, _ in self._by_layer()))

    def layer(self, stack: StackName, index: int) -> list[SublayerPlan]:
        """The sublayers of one layer, in forward order; `index` counts from 0 within the stack."""
        found = self._by_layer().get((stack, index))
        if found is None:
            raise KeyError(f"the plan has no layer {index} in the {stack} stack")
        return found

    def num_layers(self, stack: StackName) -> int:
        """Layers of one stack (0 where the family has none)."""
        return sum(1 for name, _ in self._by_layer() if name == stack)

    def to_json(self, indent: int | None = None) -> str:
        """JSON text; floats round-trip exactly."""
        return json.dumps(asdict(self), indent=indent)

    @classmethod
    def from_json(cls, text: str) -> "SignalPlan":
        """Inverse of `to_json`."""
        values = json.loads(text)
        return cls(
            scheme=values["scheme"], family=values["family"], norm_position=values["norm_position"],
            embedding=EmbeddingPlan(**values["embedding"]),
            sublayers=tuple(SublayerPlan(**sublayer) for sublayer in values["sublayers"]),
            head=HeadPlan(**values["head"]), final=StreamPrediction(**values["final"]),
            role_factors=values.get("role_factors", {}),
        )

    def _by_layer(self) -> dict[tuple[str, int], list[SublayerPlan]]:
        # Computed once: a model of 1000 layers asks for each of them.
        cached = self.__dict__.get("_layers")
        if cached is None:
            cached = {}
            for sublayer in self.sublayers:
                cached.setdefault((sublayer.stack, sublayer.layer), []).append(sublayer)
            object.__setattr__(self, "_layers", cached)
        return cached
