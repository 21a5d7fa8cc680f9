"""What single layers and windows of layers are worth: the loss without them.

A skipped layer hands on what came in; in Pre-LN times the product of its lambdas, which is the layer with its branches switched off
(in the folded, plain model exactly the identity). One walk through the model a batch: what lies in front of a skip is not run again.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from megadsl.model.activations import Activations
from megadsl.model.stack import SequentialModel
from megadsl.monitor.diagnosis.result import Skip
from megadsl.schemes.plan import SignalPlan


@dataclass(frozen=True)
class _Cut:
    """A skip in the list of layers: entries start ... stop - 1 are left out, the hidden state is multiplied by `scale`."""

    skip: Skip
    start: int
    stop: int
    scale: float


def choose_skips(plan: SignalPlan, most: int) -> list[Skip]:
    """About `most` single layers and a third as many windows, spread evenly over every stack; all layers where they are few."""
    skips = []
    for stack in plan.stacks:
        layers, share = plan.num_layers(stack), max(1, most // len(plan.stacks))
        skips += [Skip(stack, layer, 1) for layer in _spread(layers, share)]
        windows = max(1, share // 3)
        size = max(2, -(-layers // windows))
        if size < layers:
            skips += [Skip(stack, first, size) for first in _spread(layers - size + 1, windows)]
    return skips


@torch.inference_mode()
def skip_losses(network: SequentialModel, plan: SignalPlan, skips: Sequence[Skip], batches: Sequence[dict[str, torch.Tensor]],
                inputs_of: Callable, loss_of: Callable) -> list[Skip]:
    """`skips` with the increase of the loss. loss_of(output, batch) is a batch's share of the mean loss; they add up to it."""
    calls = [call for _, call in network.calls()]
    cuts = [_cut(network, plan, skip) for skip in skips]
    base, losses = 0.0, [0.0] * len(cuts)
    for batch in batches:
        value = Activations(inputs_of(batch))
        for index, call in enumerate(calls):
            for number, cut in enumerate(cuts):
                if cut.start == index:
                    rest = value.replace(hidden=value.hidden * cut.scale)
                    for later in calls[cut.stop:]:
                        rest = later(rest)
                    losses[number] += float(loss_of(rest, batch))
            value = call(value)
        base += float(loss_of(value, batch))
    return [replace(cut.skip, loss_increase=loss - base) for cut, loss in zip(cuts, losses, strict=True)]


def _cut(network: SequentialModel, plan: SignalPlan, skip: Skip) -> _Cut:
    names = [entry.name for entry in network.entries]
    start = names.index(f"{skip.stack}.{skip.first}")
    scales = [sublayer.residual_scale for layer in range(skip.first, skip.first + skip.count) for sublayer in plan.layer(skip.stack, layer)]
    # A norm behind the addition undoes any factor; without one the factor is what later branches are added to.
    return _Cut(skip, start, start + skip.count, math.prod(scales) if plan.norm_position in ("pre", "none") else 1.0)


def _spread(count: int, most: int) -> list[int]:
    """At most `most` of the numbers 0 ... count - 1, evenly spread, both ends among them."""
    if count <= most:
        return list(range(count))
    if most == 1:
        return [count // 2]
    return sorted({round(index * (count - 1) / (most - 1)) for index in range(most)})
