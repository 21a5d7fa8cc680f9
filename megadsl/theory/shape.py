"""A model as the theory sees it: widths, lengths, and one record a residual addition. Schemes fill these in.

Theory knows neither configs nor schemes, so that `from megadsl import theory` needs numpy and scipy only.

Letters: d hidden_size, d_f ffn_hidden_size, H num_heads, G num_query_groups, d_h head_dim, n length.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

Kind = Literal["self_attention", "cross_attention", "ffn"]


@dataclass(frozen=True)
class ModelShape:
    """Everything of a transformer that its signal at initialisation depends on, weights and scales excepted."""

    hidden_size: int
    ffn_hidden_size: int
    num_heads: int
    num_query_groups: int
    head_dim: int
    length: int
    family: Literal["decoder", "encoder", "encoder_decoder"] = "decoder"
    norm_position: Literal["pre", "post", "both", "none"] = "pre"
    target_length: int | None = None
    activation: str = "gelu"
    normalization: Literal["LayerNorm", "RMSNorm"] = "LayerNorm"
    eps: float = 1e-5
    dropout: float = 0.0
    attention_dropout: float = 0.0
    rotary_base: float | None = None
    qk_norm: bool = False
    attention_softcap: float = 0.0

    @property
    def inner_norm(self) -> bool:
        """A norm in front of every branch."""
        return self.norm_position in ("pre", "both")

    @property
    def outer_norm(self) -> bool:
        """A norm behind every addition."""
        return self.norm_position in ("post", "both")

    @property
    def projected(self) -> float:
        """Share of a gradient's variance that the projections of one norm leave: LayerNorm has two directions, RMSNorm one."""
        return 1.0 - (2.0 if self.normalization == "LayerNorm" else 1.0) / self.hidden_size

    @property
    def final_norm(self) -> bool:
        """A norm at the end of a stack, whose stream no other norm has seen."""
        return self.norm_position == "pre"

    def stack_length(self, stack: str) -> int:
        """Tokens that flow through a stack: the targets in the decoder of an encoder_decoder, else `length`."""
        if self.family == "encoder_decoder" and stack == "decoder":
            return self.target_length or self.length
        return self.length


@dataclass(frozen=True)
class Sublayer:
    """One residual addition: residual_scale * skip + branch_scale * branch.

    `weight_std` by role (query, key, value, attention_output | fc1, fc2). The stds of (value, attention_output) or of fc2 may be
    None: they are then chosen so that the branch has second moment 1, averaged over positions (value and attention_output
    equally). `norm_scale` multiplies the output of the norm in front of the branch.
    """

    stack: Literal["decoder", "encoder"]
    layer: int
    kind: Kind
    residual_scale: float
    branch_scale: float
    weight_std: Mapping[str, float | None] = field(default_factory=dict)
    norm_scale: float = 1.0


@dataclass(frozen=True, eq=False)
class PositionMoments:
    """What enters a stack whose positions are not alike (patches of an image, of which neighbours resemble each other).

    content: [n, n] mean overlap of the vectors at two positions, on the diagonal their second moments, in units of the mean second
        moment of all positions.
    waves: [n, d] fixed positions of root mean square 1, times the plan's position std; None: a random table, or no positions.
    """

    content: np.ndarray
    waves: np.ndarray | None = None


@dataclass(frozen=True)
class Embedding:
    """The embedding sum. A std is None where there is no such table.

    `repeat_probability`: two positions of a sequence hold the same word (pi_2); `same_type_probability`: the same token type.
    `sinusoidal`: the position part is a fixed sinusoid of root mean square `position_std` instead of a random table.
    `norm_gain`: gain of a norm between sum and dropout; None: no such norm. `positions`: moments position by position, which take
    the place of `repeat_probability`, and their `waves` that of the sinusoid. `spread`: second moments of the
    word part of equal shares of the positions over their mean; (): all alike.
    """

    word_std: float
    position_std: float | None
    tokentype_std: float | None
    repeat_probability: float
    same_type_probability: float = 2.0 / 3.0
    sinusoidal: bool = False
    norm_gain: float | None = None
    positions: PositionMoments | None = None
    spread: tuple[float, ...] = ()


@dataclass(frozen=True)
class Head:
    """What the gradient at the head's input depends on.

    `dense_std`: BERT's transform norm(activation(dense @ h)) stands in front of the logits; None: it does not.
    `repeat_probability`: two predicted words are equal (None: the embedding's); `predicted_share`: positions that are predicted
    (None: 15 % in an encoder, else all); `z_loss`: coefficient of logsumexp(logits)^2 in the loss; `label_smoothing`: share of a
    label that goes to all outputs alike.
    """

    logit_variance: float = 1.0
    dense_std: float | None = None
    repeat_probability: float | None = None
    predicted_share: float | None = None
    z_loss: float = 0.0
    label_smoothing: float = 0.0
