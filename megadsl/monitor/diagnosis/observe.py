"""Observes a whole model on one process while it runs forward and backward: the residual stream, its gradient, attention, FFN units.

Hooks from outside: nothing in forward code knows of them. Sums stay on the device until `values` is asked for. Padding is left out.
Shape letters: s sequence (queries), t keys, b micro-batch, h hidden, n heads, d head size, f FFN size, p points.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch.nn.attention.flex_attention import BlockMask

from megadsl.model.activations import Activations
from megadsl.model.core_attention import ScaledDotProductAttention
from megadsl.model.residual import ResidualConnection
from megadsl.model.stack import WRAPPER_PREFIX, LayerEntry, SequentialModel
from megadsl.monitor.moments import angles, dead_sums, divided, logit_moments, stream_means, stream_sums
from megadsl.monitor.signal import Point

# Name of a module within a layer -> kind of the sublayer that it belongs to.
_ADDITIONS = {"self_attn_bda": "self_attention", "cross_attn_bda": "cross_attention", "mlp_bda": "ffn"}
# Attention is looked at from so many queries of so many sequences of a batch: scores take s * t * n numbers.
_QUERIES, _SEQUENCES = 128, 4


class Observation:
    """Runs the layers one by one and keeps sums for every point. `with Observation(...) as seen: output = seen.run(inputs)`."""

    def __init__(self, network: SequentialModel, points: list[Point], embedding: str):
        self._network, self._embedding = network, embedding
        self._index = {point.name: number for number, point in enumerate(points)}
        parameter = next(network.parameters())
        self._device = parameter.device
        count = len(points)
        self._forward = torch.zeros(count, 5, dtype=torch.float64, device=self._device)  # see moments.stream_sums
        self._gradient = torch.zeros_like(self._forward)
        self._angle = torch.zeros(count, 2, dtype=torch.float64, device=self._device)  # see moments.angles
        self._coordinates: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # point -> ([h] largest |x|, [h] sum of x^2)
        self._attention: dict[int, torch.Tensor] = {}                # point -> [n, 4]: variance, entropy, queries, largest
        self._units: dict[int, torch.Tensor] = {}                    # point -> [f]: largest |unit|
        self._positions: torch.Tensor | None = None
        self._handles: list = []

    def __enter__(self) -> "Observation":
        for name, module in self._network.layers.named_modules():
            number, _, rest = name.partition(".")
            kind = rest.removeprefix(WRAPPER_PREFIX).partition(".")[0]
            place = f"{self._network.entries[int(number)].name}." if number else ""
            if isinstance(module, ResidualConnection):
                self._handles.append(module.register_forward_hook(self._around_addition(self._index[place + _ADDITIONS[kind]])))
            elif isinstance(module, ScaledDotProductAttention):
                self._handles.append(module.register_forward_pre_hook(self._before_attention(self._index[place + kind]), with_kwargs=True))
            elif name.endswith("mlp.linear_fc2"):
                self._handles.append(module.register_forward_pre_hook(self._before_fc2(self._index[place + "ffn"])))
        return self

    def __exit__(self, *exception) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def run(self, inputs: dict[str, torch.Tensor]) -> Activations:
        """The model's output for a batch on its device."""
        value = Activations(inputs)
        for entry, call in self._network.calls():
            before = value.get("hidden")
            self._positions = real_positions(value)
            value = call(value)
            hidden = value.get("hidden")
            if hidden is None:
                continue
            if torch.is_grad_enabled() and not hidden.requires_grad:
                # The weights ask for no gradient: the graph starts here.
                hidden = hidden.requires_grad_()
            if entry.name == self._embedding:
                self._observe(self._index["embedding"], hidden)
            elif entry.name == "final_norm":
                self._observe(self._index["final"], hidden)
            elif entry.takes:
                self._turned(entry, before, hidden)
        return value

    def values(self) -> dict[str, np.ndarray]:
        """By quantity of the signal, [p]; NaN where a point has none."""
        second, mean, correlation = stream_means(self._forward.cpu().numpy())
        gradient, _, gradient_correlation = stream_means(self._gradient.cpu().numpy())
        angle, tokens = self._angle.cpu().numpy().T
        found = {
            "forward_second_moment": second, "forward_mean": mean, "token_correlation": correlation,
            "gradient_variance": divided(gradient, np.full(len(gradient), gradient[self._index["final"]])),
            "gradient_correlation": gradient_correlation, "angular_distance": divided(angle, tokens),
        }
        for name, reduce in (("attention_logit_variance", lambda heads: float((heads[:, 0] / heads[:, 2]).mean())),
                             ("attention_logit_max", lambda heads: float(heads[:, 3].max())),
                             ("attention_entropy", lambda heads: float((heads[:, 1] / heads[:, 2]).mean()))):
            found[name] = self._at_points(self._attention, reduce)
        found["dead_activations"] = self._at_points(self._units, lambda largest: float(torch.divide(*dead_sums(largest[None])[0])))
        return found

    def heads(self) -> dict[str, dict[str, list[float]]]:
        """By name and addition: [n]."""
        names = {index: name for name, index in self._index.items()}
        columns = {"logit_variance": lambda heads: heads[:, 0] / heads[:, 2], "logit_max": lambda heads: heads[:, 3],
                   "entropy": lambda heads: heads[:, 1] / heads[:, 2]}
        return {key: {names[index]: column(sums).tolist() for index, sums in sorted(self._attention.items())}
                for key, column in columns.items()}

    def coordinates(self) -> tuple[np.ndarray, np.ndarray]:
        """(largest |activation| of every coordinate, its root mean square), each [p, h]; NaN for points that were not reached."""
        width = next(iter(self._coordinates.values()))[0].numel()
        largest, mean = np.full((2, len(self._index), width), math.nan)
        for index, (top, squares) in self._coordinates.items():
            largest[index] = top.float().cpu().numpy()
            mean[index] = (squares * width / self._forward[index, 3]).sqrt().float().cpu().numpy()
        return largest, mean

    def _at_points(self, sums: dict, reduce: Callable) -> np.ndarray:
        row = np.full(len(self._index), math.nan)
        for index, kept in sums.items():
            row[index] = reduce(kept)
        return row

    def _around_addition(self, index: int):
        def wrap(module, arguments, add):
            def measured(branch_with_bias, residual, dropout):
                hidden = add(branch_with_bias, residual, dropout)
                self._observe(index, hidden)
                return hidden

            return measured

        return wrap

    def _observe(self, index: int, hidden: torch.Tensor) -> None:
        x, positions = hidden.detach().float(), self._positions
        if positions is not None and positions.shape == x.shape[:2]:
            x = x * positions[..., None]
        else:
            positions = None
        self._forward[index] += stream_sums(x[None], positions)[0][0]
        largest, squares = x.abs().amax(dim=(0, 1)), x.square().sum(dim=(0, 1))
        if index in self._coordinates:
            kept = self._coordinates[index]
            largest, squares = torch.maximum(largest, kept[0]), squares + kept[1]
        self._coordinates[index] = (largest, squares)
        if hidden.requires_grad:
            hidden.register_hook(lambda gradient: self._add_gradient(index, gradient, positions))

    def _add_gradient(self, index: int, gradient: torch.Tensor, positions: torch.Tensor | None) -> None:
        self._gradient[index] += stream_sums(gradient.float()[None], positions)[0][0]

    @torch.no_grad()
    def _turned(self, entry: LayerEntry, before: torch.Tensor, after: torch.Tensor) -> None:
        before, after, positions = before.float()[None], after.float()[None], self._positions
        norms = [torch.linalg.vector_norm(x, dim=-1) for x in (before, after)]
        if positions is not None and positions.shape != norms[0].shape[1:]:
            positions = None
        self._angle[self._index[f"{entry.name}.ffn"]] += angles(before, norms[0], after, norms[1], positions)[0]

    def _before_fc2(self, index: int):
        def look(module, arguments):
            units = arguments[0].detach().float()
            if self._positions is not None and self._positions.shape == units.shape[:2]:
                units = units * self._positions[..., None]
            largest = units.abs().amax(dim=(0, 1))
            self._units[index] = torch.maximum(largest, self._units.get(index, largest))

        return look

    def _before_attention(self, index: int):
        @torch.no_grad()
        def look(module, arguments, named):
            query, key, _, mask = arguments
            chosen = torch.linspace(0, query.size(0) - 1, min(query.size(0), _QUERIES), device=query.device).round().long()
            kind = named.get("attn_mask_type")  # Megatron's enum, which this room does not import
            scores = _scores(module, query, key, mask, kind is not None and kind.name == "causal", chosen)
            real = None
            if self._positions is not None and self._positions.shape == query.shape[:2]:
                real = self._positions[chosen, :len(scores)].T[:, None, :] > 0
            found = _attention_sums(scores, real)
            if index in self._attention:
                kept = self._attention[index]
                found = torch.cat([found[:, :3] + kept[:, :3], torch.maximum(found[:, 3:], kept[:, 3:])], dim=1)
            self._attention[index] = found

        return look


def real_positions(value: Activations) -> torch.Tensor | None:
    """[s, b]: 1 where a position is no padding (segment 0); None: all are real, or what flows here has no segments of its own."""
    segments = None if "memory" in value else value.get("source_segments", value.get("segments"))
    if segments is None or bool((segments > 0).all()):
        return None
    return (segments > 0).T.float()


def _scores(module: ScaledDotProductAttention, query: torch.Tensor, key: torch.Tensor, mask, causal: bool,
            chosen: torch.Tensor) -> torch.Tensor:
    """Logits [b, n, s, t] in fp32 from the `chosen` queries of some of the sequences; -inf where a key is not seen."""
    length, keys, batch = query.size(0), key.size(0), min(query.size(1), _SEQUENCES)
    query, key = query[chosen, :batch].float(), key[:, :batch].float()
    key = key.repeat_interleave(query.size(2) // key.size(2), dim=2)
    scale = query.size(-1) ** -0.5 if module.softmax_scale is None else module.softmax_scale
    scores = torch.einsum("sbnd,tbnd->bnst", query, key) * scale
    if isinstance(mask, BlockMask):
        sequence, place = torch.arange(batch, device=query.device), torch.arange(keys, device=query.device)
        seen = mask.mask_mod(sequence[:, None, None], 0, chosen[:, None], place)
        return scores.masked_fill(~seen.view(-1, 1, *seen.shape[-2:]), -torch.inf)
    if mask is not None:
        mask = mask[:batch] if mask.size(0) > 1 else mask
        return scores + (mask[..., chosen, :] if mask.size(-2) > 1 else mask).float()
    if causal:
        hidden = torch.arange(keys, device=query.device) > chosen[:, None] + keys - length
        return scores.masked_fill(hidden, -torch.inf)
    return scores


def _attention_sums(scores: torch.Tensor, real: torch.Tensor | None) -> torch.Tensor:
    """[b, n, s, t] -> [n, 4]: sums over queries of the variance over the keys seen and of entropy / log(keys seen), how many queries
    that see two keys or more there were, and the largest logit. `real` [b, 1, s]: queries that are no padding; None: all."""
    seen = scores > -torch.inf
    variance, entropy, _, counted = logit_moments(scores.masked_fill(~seen, 0.0), seen)
    counted = (counted if real is None else counted * real).expand_as(variance)
    largest = (scores if real is None else scores.masked_fill(~real[..., None], -torch.inf)).amax(dim=(0, 2, 3))
    return torch.stack([(variance * counted).sum(dim=(0, 2)), (entropy * counted).sum(dim=(0, 2)), counted.sum(dim=(0, 2)), largest], dim=1)
