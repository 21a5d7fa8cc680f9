"""Folding: a scheme's scalars multiplied into the weights, so that a plain transformer without any of them is the same function.

With y_s = x_s / (lambda_0 ... lambda_{s-1}), Pre-LN x' = lambda x + beta f(N(x)) is y' = y + beta / (lambda_0 ... lambda_s) f(N(y)):
the factor goes into the last matrix (and bias) of the branch. Post-LN: LN(lambda x + beta f) = LN(x + beta / lambda f). The factors on
norms (LayerNorm Scaling) go into their gain and bias, trained gates (LayerScale) into the rows of the last matrix, the head's scale
into the norm in front of it (tied) or into its own matrix. Unfolding divides. All numbers are the SignalPlan's.

A norm sees its input divided by c, which it undoes but for epsilon: it is the same function with epsilon / c^2.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch

from megadsl.config.model import ModelConfig
from megadsl.errors import UserError
from megadsl.schemes.plan import SignalPlan, SublayerPlan

# kind of a sublayer -> (last linear of its branch, norm in front of it, residual addition)
_PARTS = {
    "self_attention": ("self_attention.linear_proj", "input_layernorm", "self_attn_bda"),
    "cross_attention": ("cross_attention.linear_proj", "pre_cross_attn_layernorm", "cross_attn_bda"),
    "ffn": ("mlp.linear_fc2", "pre_mlp_layernorm", "mlp_bda"),
}


@dataclass(frozen=True)
class TrainedGate:
    """A trained branch scale: its name, where it starts and whether it has one number a channel (else one in all)."""

    name: str
    start: float
    per_channel: bool


@dataclass
class Folding:
    """How the weights of a plan become plain ones.

    Attributes:
        factors: plain name of a linear or norm -> factor on its weight and bias.
        gates: plain name of a linear -> the trained gate on its rows.
        scaled_norms: plain name of a norm -> its name under the plan.
        epsilon_factors: plain name of a norm -> factor on epsilon that makes the folded model exactly the same function.
    """

    factors: dict[str, float] = field(default_factory=dict)
    gates: dict[str, TrainedGate] = field(default_factory=dict)
    scaled_norms: dict[str, str] = field(default_factory=dict)
    epsilon_factors: dict[str, float] = field(default_factory=dict)

    @property
    def epsilon_factor(self) -> float:
        """One factor f for all norms, where a model has a single epsilon: it makes the largest |f / factor - 1|, by which a norm's
        epsilon is then wrong in units of its own stream, as small as it can be (dslm Pre-LN, k = 2: 0.76)."""
        # 1: of the norms outside of the stacks (on the embedding, in BERT's head).
        inverse = [1.0, *(1.0 / factor for factor in self.epsilon_factors.values())]
        return 2.0 / (min(inverse) + max(inverse))


def folding(plan: SignalPlan, model: ModelConfig) -> Folding:
    """The folding of a plan.

    Raises:
        UserError: the scheme has norms in other places than a plain Pre-LN or Post-LN transformer.
    """
    if plan.norm_position not in ("pre", "post"):
        where = "no norms" if plan.norm_position == "none" else "norms in front of and behind every branch"
        raise UserError(f"scheme.name={plan.scheme} has {where}, which no plain transformer has; train with another scheme to exchange it.")
    result, product = Folding(), {}
    for sublayer in plan.sublayers:
        before = product.get(sublayer.stack, 1.0)
        product[sublayer.stack] = before * sublayer.residual_scale if plan.norm_position == "pre" else 1.0
        _fold_sublayer(result, sublayer, plan.norm_position, before)
    last = plan.sublayers[-1]
    if plan.norm_position == "pre":
        for stack, scale in product.items():
            end = "final_norm" if stack == last.stack else f"{stack}.final_norm"
            result.epsilon_factors[end] = scale ** -2
    if plan.head.hidden_scale != 1.0:
        end = "final_norm" if plan.norm_position == "pre" else f"{last.stack}.{last.layer}.mlp_bda.norm"
        tied = "lm_head.norm" if "head_dense" in plan.head.weight_std else end  # BERT's transform ends with a norm
        head = "output_head.linear" if model.untie_embeddings_and_output_weights else tied
        result.factors[head] = result.factors.get(head, 1.0) * plan.head.hidden_scale
    return result


def _fold_sublayer(result: Folding, sublayer: SublayerPlan, norm_position: str, before: float) -> None:
    linear, norm, addition = (f"{sublayer.stack}.{sublayer.layer}.{part}" for part in _PARTS[sublayer.kind])
    if sublayer.gate == "fixed":
        branch = sublayer.branch_scale
    else:
        branch = 1.0
        result.gates[linear] = TrainedGate(f"{addition}.branch_scale", sublayer.branch_scale, sublayer.gate == "channel")
    result.factors[linear] = branch / (before * sublayer.residual_scale)
    if norm_position == "post":
        result.epsilon_factors[f"{addition}.norm"] = sublayer.residual_scale ** -2
    else:
        result.epsilon_factors[norm] = before ** -2
        if sublayer.norm_scale != 1.0:
            result.factors[norm] = sublayer.norm_scale
            result.scaled_norms[norm] = f"{norm}.norm"


def fold(weights: Mapping[str, torch.Tensor], result: Folding) -> Iterator[tuple[str, torch.Tensor]]:
    """(plain name, tensor) of every weight under the plan; the gates are gone. Products are taken in fp64 and rounded once."""
    plain_names = {theirs: plain for plain, theirs in result.scaled_norms.items()}
    gates = {gate.name for gate in result.gates.values()}
    for name, tensor in weights.items():
        if name in gates:
            continue
        owner, _, kind = name.rpartition(".")
        owner = plain_names.get(owner, owner)
        factor = result.factors.get(owner, 1.0)
        if owner in result.gates:
            factor = factor * weights[result.gates[owner].name].double()
        yield f"{owner}.{kind}", _times(tensor, factor)


def unfold(weights: Mapping[str, torch.Tensor], result: Folding) -> Iterator[tuple[str, torch.Tensor]]:
    """Inverse of `fold`, with every gate at its start: the same function under the plan, from plain weights."""
    for name, tensor in weights.items():
        owner, _, kind = name.rpartition(".")
        factor = result.factors.get(owner, 1.0)
        if owner in result.gates:
            gate = result.gates[owner]
            if kind == "weight":
                yield gate.name, torch.full((tensor.size(0) if gate.per_channel else 1,), gate.start)
            factor = factor * gate.start
        yield f"{result.scaled_norms.get(owner, owner)}.{kind}", _times(tensor, 1.0 / factor)


def _times(tensor: torch.Tensor, factor: float | torch.Tensor) -> torch.Tensor:
    if isinstance(factor, float) and factor == 1.0:
        return tensor
    if isinstance(factor, torch.Tensor) and tensor.dim() == 2:
        factor = factor.view(-1, 1)
    return (tensor.double() * factor).to(tensor.dtype)
