"""lambda * x + beta * f(x): the only place where the two scalars of the plan are applied, and where Post-LN normalises.

DeepScaleLM (arXiv 2403.09635, section 4): lambda^2 + beta^2 = 1 keeps the variance of the residual stream at 1 when the
branch has variance 1. The module fills Megatron-core's bias-dropout-add slot: it is called as
`module(training, fused)(branch_with_bias, residual, dropout)`. Post-LN is norm(lambda * x + beta * f(x)); Megatron-core's own
option for it (apply_residual_connection_post_layernorm) is never read there.

Shape letters: s sequence, b micro-batch, h hidden.
"""

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.jit import jit_fuser

from megadsl.model.init import ParameterTag, tag

Gate = Literal["fixed", "scalar", "channel"]


class ResidualConnection(torch.nn.Module):
    """norm(residual_scale * residual + branch_scale * dropout(branch + bias)); the norm is Post-LN's, else there is none.

    With both scales 1 the sum is Megatron-core's own bias-dropout-add, so that other schemes run the stock code.

    Args:
        gate: "fixed": branch_scale is a number; "scalar" and "channel": it is trained, one for all (ReZero) or one per
            coordinate (LayerScale), and starts at branch_scale.
        hidden_size: needed for gate "channel".
        make_norm: builds the norm of Post-LN.
        config: ignored; Megatron-core gives it to one of the three slots.
    """

    def __init__(self, residual_scale: float, branch_scale: float, gate: Gate = "fixed", hidden_size: int = 1,
                 make_norm: Callable[[], torch.nn.Module] | None = None, config=None):
        super().__init__()
        self.residual_scale = residual_scale
        self.branch_scale: float | torch.nn.Parameter = branch_scale
        if gate != "fixed":
            shape = (hidden_size if gate == "channel" else 1,)
            self.branch_scale = torch.nn.Parameter(torch.empty(shape))
            tag(self.branch_scale, ParameterTag("residual_gate", shape, {}, constant=branch_scale))
        self.norm = None if make_norm is None else make_norm()

    def forward(self, training: bool, fused: bool) -> Callable:
        if isinstance(self.branch_scale, torch.nn.Parameter):
            add = partial(self._call, _gated_add, training)
        elif self.residual_scale == 1.0 and self.branch_scale == 1.0:
            add = get_bias_dropout_add(training, fused)
        else:
            add = partial(self._call, _fused_scaled_add if fused else _scaled_add, training)
        if self.norm is None:
            return add
        return lambda branch_with_bias, residual, dropout: self.norm(add(branch_with_bias, residual, dropout))

    def _call(self, add: Callable, training: bool, branch_with_bias, residual: torch.Tensor, dropout: float) -> torch.Tensor:
        branch, bias = branch_with_bias  # [s, b, h], [h] or None
        return add(branch, bias, residual, dropout if training else 0.0, self.residual_scale, self.branch_scale)


def _scaled_add(branch, bias, residual, dropout: float, residual_scale: float, branch_scale: float):
    if bias is not None:
        branch = branch + bias
    if dropout:
        branch = F.dropout(branch, p=dropout)
    if residual.dtype == torch.float32:
        return torch.add(residual * residual_scale, branch, alpha=branch_scale)
    # In 16 bits lambda * x must not be rounded before the addition: at 1000 layers 1 - lambda is less than bf16 resolves.
    return torch.add(_wide(residual) * residual_scale, branch, alpha=branch_scale).to(residual.dtype)


def _gated_add(branch, bias, residual, dropout: float, residual_scale: float, gate: torch.Tensor):
    branch = F.dropout(branch if bias is None else branch + bias, p=dropout)
    return (_wide(residual) * residual_scale + gate * branch).to(residual.dtype)


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    # At least 32 bits; fp64 stays (folding is checked in it).
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


# On a GPU one compiled kernel reads and writes each tensor once, as Megatron-core's own fused bias-dropout-add does.
_fused_scaled_add = jit_fuser(_scaled_add)
