"""The client optimizer given to DeepSpeed, its parameter groups, and the gradient norm where DeepSpeed does not report one
(ZeRO 0)."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial

import torch
import torch.distributed as dist

from megadsl.config.training import OptimizerConfig
from megadsl.model.init import DECAYS, tag_of
from megadsl.model.stack import LayerEntry


class LayerDepths:
    """How deep a parameter lies: 0 in front of the first layer, i in layer i (counted from 1), `last` in the head."""

    def __init__(self, entries: Sequence[LayerEntry], freeze_layers: int = 0):
        self._depth, depth = {}, 0
        final = max((index for index, entry in enumerate(entries) if entry.takes), default=-1)
        for index, entry in enumerate(entries):
            depth += bool(entry.takes) or index == final + 1
            self._depth.setdefault(entry.name, depth)
        self.last, self._freeze_layers = depth, freeze_layers

    def of(self, name: str) -> int:
        """`name` is a parameter's canonical one."""
        entry = name
        while entry not in self._depth:
            entry, dot, _ = entry.rpartition(".")
            if not dot:
                raise ValueError(f"parameter {name} belongs to no entry of the model's list")
        return self._depth[entry]

    def is_frozen(self, name: str) -> bool:
        """Whether it is in the embedding or in one of the first `freeze_layers` layers."""
        return bool(self._freeze_layers) and self.of(name) <= self._freeze_layers

    def lr_factor(self, name: str, layer_lr_decay: float) -> float:
        """What the learning rate of a parameter is multiplied by."""
        if self.is_frozen(name):
            return 0.0
        return layer_lr_decay ** (self.last - self.of(name)) if layer_lr_decay != 1.0 else 1.0


def freeze(parameters: Iterable[tuple[str, torch.nn.Parameter]], depths: LayerDepths) -> None:
    """Let the gradients of frozen parameters be 0, so that they neither move nor count in the gradient norm.

    They keep their gradients, because a pipeline sends them on and ZeRO reduces them in every layout alike.
    """
    for name, parameter in parameters:
        if depths.is_frozen(name):
            parameter.register_hook(torch.zeros_like)


def parameter_groups(parameters: Iterable[tuple[str, torch.nn.Parameter]], options: OptimizerConfig,
                     role_factors: dict[str, dict[str, float]], depths: LayerDepths | None = None) -> list[dict]:
    """AdamW groups of (canonical name, parameter) pairs: decayed and not, with the plan's factors by role and those by depth.

    `lr_factor` of a group multiplies the scheduled learning rate (the engine sets `lr` before every step).

    Raises:
        ValueError: a factor for a role that is not in the table of roles: it would be dropped in silence.
    """
    if unknown := role_factors.keys() - DECAYS.keys():
        raise ValueError(f"the plan has optimizer factors for {', '.join(sorted(unknown))}, which no parameter is (megadsl.model.init.DECAYS)")
    groups: dict[tuple, dict] = {}
    for name, parameter in parameters:
        tag = tag_of(name, parameter)
        factors = role_factors.get(tag.role, {})
        decay = options.weight_decay * factors.get("weight_decay", 1.0) if tag.decays else 0.0
        lr_factor = factors.get("lr", 1.0) * (depths.lr_factor(name, options.layer_lr_decay) if depths else 1.0)
        key = decay, options.adam_eps * factors.get("eps", 1.0), lr_factor
        group = groups.setdefault(key, {"params": [], **dict(zip(("weight_decay", "eps", "lr_factor"), key, strict=True))})
        group["params"].append(parameter)
    return list(groups.values())


class GuardedAdamW(torch.optim.AdamW):
    """Fused AdamW that leaves everything as it is when this step is not to be taken (gradients that are not finite, a spike).

    DeepSpeed calls `step` once per parameter group or sub-group, after it has computed the global norm. `is_taken` has one
    answer per step on all ranks, so they all skip or none does.
    """

    def __init__(self, parameters, is_taken: Callable[[], bool], **options):
        super().__init__(parameters, fused=True, **options)
        self._is_taken = is_taken
        # (tensors about to be stepped, the step) -> its result: what measures a step stands around it; None: nothing does.
        self.around: Callable[[Sequence[torch.Tensor], Callable[[], object]], object] | None = None

    def step(self, closure=None):
        if not self._is_taken():
            return None
        if self.around is None:
            return super().step(closure)
        stepped = [parameter for group in self.param_groups for parameter in group["params"] if parameter.grad is not None]
        return self.around(stepped, partial(super().step, closure))


def global_gradient_norm(parameters: Iterable[torch.nn.Parameter], tensor_rank: int, tensor_group) -> torch.Tensor:
    """L2 norm of the gradient over the whole model (no pipeline), a replicated parameter counted once."""
    gradients = [
        parameter.grad for parameter in parameters
        if parameter.grad is not None and (parameter.tensor_model_parallel or tensor_rank == 0)
    ]
    squared = torch.nn.utils.get_total_norm(gradients).float().square()
    dist.all_reduce(squared, group=tensor_group)
    return squared.sqrt()
