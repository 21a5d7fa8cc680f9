"""Measured moments of the residual stream, one set a sublayer, accumulated on the device.

A probe wraps what a ResidualConnection returns, from outside: nothing in forward code knows of it, and nothing is copied
to the host before `read`. Shape letters: s sequence, b micro-batch, h hidden, l sublayers of this stage.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megadsl.model.activations import Activations
from megadsl.model.residual import ResidualConnection


@dataclass(frozen=True)
class StreamMoments:
    """Per coordinate, by sublayer in forward order, each [l]. Gradient moments are in the units of the loss given to backward."""

    forward_variance: list[float]
    correlation: list[float]
    gradient_variance: list[float]
    gradient_correlation: list[float]


class StreamProbes:
    """Measures the stream after every residual addition of `model` (or the outputs of `modules`) while the context is open.

        with StreamProbes(model) as probes:
            loss = loss_of(model(inputs))
            loss.backward()
        moments = probes.read()
    """

    def __init__(self, model: torch.nn.Module, modules: Sequence[torch.nn.Module] | None = None):
        self._modules = residual_connections(model) if modules is None else list(modules)
        device = next(model.parameters()).device
        self._forward = torch.zeros(len(self._modules), 3, device=device)  # sums of (second moment, overlap, 1)
        self._gradient = torch.zeros_like(self._forward)
        self._handles: list = []

    def __enter__(self) -> "StreamProbes":
        for index, module in enumerate(self._modules):
            hook = self._around_addition(index) if isinstance(module, ResidualConnection) else self._on_output(index)
            self._handles.append(module.register_forward_hook(hook))
        return self

    def __exit__(self, *exception) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def read(self) -> StreamMoments:
        """The means so far (one synchronisation)."""
        forward, gradient = (sums[:, :2] / sums[:, 2:].clamp(min=1) for sums in (self._forward, self._gradient))
        values = torch.cat([forward, gradient], dim=1).T.tolist()
        return StreamMoments(values[0], _ratios(values[1], values[0]), values[2], _ratios(values[3], values[2]))

    def _around_addition(self, index: int):
        def wrap(module, arguments, add):
            def measured(branch_with_bias, residual, dropout):
                return self._observe(index, add(branch_with_bias, residual, dropout))

            return measured

        return wrap

    def _on_output(self, index: int):
        return lambda module, arguments, output: self._observe(index, output)

    def _observe(self, index: int, output: torch.Tensor | Activations) -> torch.Tensor | Activations:
        hidden = output.hidden if isinstance(output, Activations) else output
        self._forward[index] += _moments(hidden.detach())
        if hidden.requires_grad:
            hidden.register_hook(lambda gradient: _accumulate(self._gradient, index, gradient))
        return output


def residual_connections(model: torch.nn.Module) -> list[ResidualConnection]:
    """The residual additions of a model in forward order."""
    return [module for module in model.modules() if isinstance(module, ResidualConnection)]


@torch.no_grad()
def _moments(x: torch.Tensor) -> torch.Tensor:
    """x [s, b, h] -> (mean square, mean overlap of two different positions of a sequence, 1), per coordinate."""
    s, b, h = x.shape
    x = x.float()
    square = x.square().sum()
    overlap = (x.sum(dim=0).square().sum() - square) / max(1, s - 1)
    return torch.stack([square, overlap, square.new_tensor(float(s * b * h))]) / (s * b * h)


def _ratios(numerators: list[float], denominators: list[float]) -> list[float]:
    return [n / d if d else 0.0 for n, d in zip(numerators, denominators, strict=True)]


def _accumulate(sums: torch.Tensor, index: int, gradient: torch.Tensor) -> None:
    sums[index] += _moments(gradient)  # returns None: a tensor hook that returns a tensor would replace the gradient
