"""Norms of weights, gradients and steps, by parameter, from a sample of its numbers: what the optimizer sees and does, in any ZeRO stage.

The optimizer steps flat tensors that hold fragments of parameters (training/state.py); `around` is called with those that it is about
to step. SAMPLE numbers of a parameter are looked at, the same random ones in every layout, so that a measured step costs little beside
the step: the norms are known to 1 / sqrt(2 SAMPLE), some 4 %. Only drawn parameters (matrices and tables) are measured.
"""

import math
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch

from megadsl.model.init import ParameterTag
from megadsl.parallel.groups import names_of_all_ranks, sum_over_all_ranks
from megadsl.parallel.rng import seed_from

SAMPLE = 256


class Fragment(Protocol):
    """A range of one parameter in a flat tensor that the optimizer steps (training/state.py)."""

    name: str
    tag: ParameterTag
    start: int
    count: int
    flat: torch.Tensor
    offset: int


class ParameterProbes:
    """Measures the steps of an optimizer over this rank's fragments. Made on all ranks together.

    Args:
        tensor_rank, tensor_size: which shard of a parameter the fragments are of.
    """

    def __init__(self, fragments: Sequence[Fragment], device: torch.device, tensor_rank: int = 0, tensor_size: int = 1):
        drawn = [fragment for fragment in fragments if fragment.tag.std]
        self._sizes = names_of_all_ranks({fragment.name: math.prod(fragment.tag.full_shape) for fragment in drawn})
        number = {name: index for index, name in enumerate(self._sizes)}
        # By the flat tensor's id: where the sampled numbers lie in it, fragment after fragment; how many each fragment has, and of which
        # parameter it is.
        self._sampled: dict[int, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}
        found: dict[int, list[tuple[np.ndarray, int, int]]] = {}
        for fragment in drawn:
            places = sampled_places(fragment.tag, fragment.name, tensor_rank, tensor_size)
            places = places[(places >= fragment.start) & (places < fragment.start + fragment.count)] - fragment.start + fragment.offset
            if len(places):
                found.setdefault(id(fragment.flat), []).append((places, len(places), number[fragment.name]))
        for key, parts in found.items():
            places, lengths, numbers = zip(*parts, strict=True)
            self._sampled[key] = (torch.from_numpy(np.concatenate(places)).to(device), torch.tensor(lengths, device=device),
                                  torch.tensor(numbers, device=device))
        self._device = device
        self._reset()

    def _reset(self) -> None:
        # By parameter: sums of squares of weights, gradients and steps, and how many numbers.
        self._sums = torch.zeros(4, len(self._sizes), dtype=torch.float64, device=self._device)

    @torch.no_grad()
    def around(self, stepped: Sequence[torch.Tensor], step: Callable[[], object]) -> object:
        """Run `step`, which steps the tensors `stepped` by their .grad, and measure it."""
        found = [(tensor, *self._sampled[id(tensor)]) for tensor in stepped if id(tensor) in self._sampled and tensor.grad is not None]
        if not found:
            return step()
        tensors, places, lengths, numbers = zip(*found, strict=True)
        before, gradient = _taken(tensors, places), _taken([tensor.grad for tensor in tensors], places)
        result = step()
        update = _taken(tensors, places).sub_(before)
        lengths, numbers = torch.cat(lengths), torch.cat(numbers)
        squares = [torch.segment_reduce(values.square(), "sum", lengths=lengths, unsafe=True) for values in (before, gradient, update)]
        self._sums.index_add_(1, numbers, torch.stack((*squares, lengths)).double())
        return result

    def read(self) -> dict[str, dict[str, float]]:
        """By quantity (signal.PARAMETER_QUANTITIES) and parameter, over what was measured since the last `read`; on all ranks together."""
        sums = sum_over_all_ranks(self._sums.clone())
        self._reset()
        mean = (sums[:3] / sums[3]).sqrt().T.tolist()
        found: dict[str, dict[str, float]] = {"weight_norm": {}, "gradient_norm": {}, "update_ratio": {}}
        for (name, size), (weight, gradient, update) in zip(self._sizes.items(), mean, strict=True):
            found["weight_norm"][name] = weight * size ** 0.5
            found["gradient_norm"][name] = gradient * size ** 0.5
            found["update_ratio"][name] = update / weight if weight else float("nan")
        return found


def _taken(tensors: Sequence[torch.Tensor], places: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensor.view(-1)[where] for tensor, where in zip(tensors, places, strict=True)]).float()


def sampled_places(tag: ParameterTag, name: str, rank: int, size: int) -> np.ndarray:
    """Places in the flattened shard of tensor-parallel rank `rank` of the numbers of a parameter that are looked at, ascending."""
    numel = math.prod(tag.full_shape)
    chosen = np.unique(np.random.RandomState(seed_from(name) % 2**32).randint(0, numel, SAMPLE))
    row_length = math.prod(tag.full_shape[1:])
    row, column = np.divmod(chosen, row_length)
    found, done = [], 0
    for rows, *others in tag.slices(rank, size):
        columns = others[0] if others else slice(0, row_length)
        inside = (row >= rows.start) & (row < rows.stop) & (column >= columns.start) & (column < columns.stop)
        found.append((row[inside] - rows.start + done) * (columns.stop - columns.start) + column[inside] - columns.start)
        done += rows.stop - rows.start
    return np.concatenate(found)
