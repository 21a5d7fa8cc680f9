"""Probes: the signal measured in a model while it runs, from outside: forward code does not know of them, and without them nothing runs.

Hooks are there on measured steps only. They copy a sample (a few sequences; of attention a few queries of one sequence) and hand it to
moments.py; what stays are sums, a few numbers a layer, on the device. `read` adds them up over ranks, the one synchronisation, and makes
a SignalRecord. Right under tensor parallelism (the stream is the same on its ranks, heads and FFN units are sliced), pipeline (each
stage measures its own points), data parallelism and accumulation (the first micro-batch of the global batch is measured), ZeRO and
recomputation (the first run of a layer gives the forward moments, the second the gradient's).

Shape letters: s sequence, b micro-batch, h hidden, n heads, g query groups, d head size, f FFN size.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch.nn.attention.flex_attention import BlockMask

from megadsl.model.activations import Activations
from megadsl.model.layer import Layer
from megadsl.model.residual import ResidualConnection
from megadsl.model.stack import LayerEntry
from megadsl.monitor.moments import Rows, angles, attention_sums, dead_sums, divided, stream_means, stream_sums
from megadsl.monitor.signal import Point, SignalRecord
from megadsl.parallel.groups import add_up_signal

_ADDITIONS = {"self_attention": "self_attn_bda", "cross_attention": "cross_attn_bda", "ffn": "mlp_bda"}
SEQUENCES = 1  # of a micro-batch
QUERIES = 8  # of one sequence
TOKENS = 64  # of one sequence, for dead units
# Columns of the sums: where each group of numbers begins.
_FORWARD, _GRADIENT, _ATTENTION, _DEAD, _ANGLE, _COLUMNS = 0, 5, 10, 13, 15, 17


class SignalProbes:
    """Measures the points of a stage's part of a model.

        with probes.watching(real):
            loss_of(model(batch)).backward()
        record = probes.read(iteration)

    Args:
        calls: (entry, module) of the list of layers, as far as this stage has them.
        points: of the whole model (signal.points_of).
        embedding: name of the entry behind which the first point lies.
        sequences: how many of a micro-batch are measured; None: all.
        tensor_size: tensor-parallel ranks, which all see the same stream.
    """

    def __init__(self, calls: Sequence[tuple[LayerEntry, Callable]], points: Sequence[Point], embedding: str, device: torch.device,
                 sequences: int | None = SEQUENCES, tensor_size: int = 1):
        self._calls, self._points, self._embedding, self._device = list(calls), list(points), embedding, device
        self._sequences, self._share = sequences, 1.0 / tensor_size
        self._place = {(point.stack, point.layer, point.kind): index for index, point in enumerate(self._points)}
        self._stacks = list(dict.fromkeys(point.stack for point in self._points if point.stack))
        self._layer_ends = self._ends()
        self._carry = {stack: max(count for index, count in self._layer_ends.items() if self._points[index].stack == stack)
                       for stack in self._stacks}  # rows that an angle looks back
        self._rows: dict[tuple, Rows] = {}
        self._hooks: list[tuple[Callable, Callable, dict]] | None = None
        self._handles: list = []
        self.recording = True  # False: hooks stay, and look away (micro-batches that are not measured)
        self._reset()

    def _ends(self) -> dict[int, int]:
        """Place of the last addition of every layer -> additions of that layer."""
        ends, counts = {}, {}
        for index, point in enumerate(self._points):
            if point.stack:
                counts[point.stack, point.layer] = counts.get((point.stack, point.layer), 0) + 1
                ends[point.stack, point.layer] = index
        return {index: counts[key] for key, index in ends.items()}

    def _reset(self) -> None:
        # In fp64: a mean over a run must not depend on how many steps it is of.
        self._sums = torch.zeros(len(self._points), _COLUMNS, dtype=torch.float64, device=self._device)
        self._largest = torch.full((len(self._points),), -torch.inf, device=self._device)

    # What is watched.

    def watching(self, real: dict[str, torch.Tensor] | None = None) -> "SignalProbes":
        """Measure what runs inside, while `recording`. `real`: by stack, which positions are not padding, [b, s]; a stack that is
        not named has none."""
        self.recording = True
        self._real = {stack: one[:self._sequences].T.float() for stack, one in (real or {}).items()}
        return self

    def __enter__(self) -> "SignalProbes":
        self._visible: dict[tuple[str, str], tuple] = {}  # by stack and kind: the same for all its layers
        self._scale: dict[tuple[str, str], float] = {}
        self._run_again: set[int] = set()
        self._forward_in: set[Layer] = set()
        if self._hooks is None:
            self._hooks, self._borrowed = [], None
            self._prepare_hooks()
        self._handles = [register(hook, **options) for register, hook, options in self._hooks]
        return self

    def _prepare_hooks(self) -> None:
        before = False  # whether what flows into the next layer is measured here
        for entry, module in self._calls:
            if isinstance(module, Layer):
                stack, _, number = entry.name.rpartition(".")
                if not before and int(number):
                    self._watch_border(module, stack, int(number))
                self._watch_layer(module, stack, int(number))
                before = True
            elif entry.name == self._embedding:
                self._hook(module.register_forward_hook, self._on_output(self._stacks[0], 0))
            elif entry.name == "final_norm":
                self._hook(module.register_forward_hook, self._on_output(self._stacks[-1], len(self._points) - 1))

    def _hook(self, register: Callable, hook: Callable, **options) -> None:
        """A hook that measured steps set: made once, since finding its module takes longer than setting it."""
        self._hooks.append((register, hook, options))

    def __exit__(self, *exception) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for rows in self._rows.values():
            rows.flush()

    def _watch_layer(self, layer: Layer, stack: str, number: int) -> None:
        inner = layer.layer
        if layer.recompute:
            # What runs within a call of the layer gives its output; what runs outside of one is a recomputation. (Grad mode would not
            # tell them apart: Megatron-core enables it around every residual addition.)
            self._hook(layer.register_forward_pre_hook, lambda module, arguments: self._forward_in.add(module))
            self._hook(layer.register_forward_hook, lambda module, arguments, output: self._forward_in.discard(module))
        for kind, name in _ADDITIONS.items():
            place = self._place.get((stack, number, kind))
            if place is None:
                continue
            addition: ResidualConnection = getattr(inner, name)
            self._hook(addition.register_forward_hook, self._around_addition(stack, place, layer))
            if kind == "ffn":
                self._hook(inner.mlp.linear_fc2.register_forward_pre_hook, self._on_units(stack, place, layer))
            else:
                core = getattr(inner, kind).core_attention
                self._hook(core.register_forward_pre_hook, self._on_attention((stack, kind), place, layer), with_kwargs=True)

    def _is_forward(self, layer: Layer) -> bool:
        return not layer.recompute or layer in self._forward_in

    def _watch_border(self, layer: Layer, stack: str, number: int) -> None:
        """The stage before measures what flows in; here the angle of the first layer needs it once more."""
        place = self._borrowed = min(self._place[key] for key in self._place if key[:2] == (stack, number)) - 1

        rows = self._rows_of("forward", stack, self._measure_stream, self._carry[stack])

        def hook(module, arguments) -> None:
            if self.recording:
                rows.add(place, arguments[0].hidden.detach()[:, :self._sequences])

        self._hook(layer.register_forward_pre_hook, hook)

    def _around_addition(self, stack: str, place: int, layer: Layer) -> Callable:
        observe = self._observer(stack, place)

        def wrap(module, arguments, add):
            def measured(branch_with_bias, residual, dropout):
                added = add(branch_with_bias, residual, dropout)
                observe(added, self._is_forward(layer), layer.recompute and layer.training)
                return added

            return measured

        return wrap

    def _on_output(self, stack: str, place: int) -> Callable:
        observe = self._observer(stack, place)

        def hook(module, arguments, output: Activations) -> None:
            observe(output.hidden, True, False)

        return hook

    def _observer(self, stack: str, place: int) -> Callable[[torch.Tensor, bool, bool], None]:
        """What looks at the stream [s, b, h] of one point: (hidden, whether this is the forward pass, whether it will be recomputed)."""
        forward_rows = self._rows_of("forward", stack, self._measure_stream, self._carry[stack])
        gradient_rows = self._rows_of("gradient", stack, self._measure_gradient)
        sequences = self._sequences

        def gradient_hook(gradient: torch.Tensor) -> None:  # None: what a tensor hook returns would replace the gradient
            gradient_rows.add(place, gradient.detach()[:, :sequences])

        def observe(hidden: torch.Tensor, forward: bool, recomputed: bool) -> None:
            looks = forward and self.recording
            if looks:
                forward_rows.add(place, hidden.detach()[:, :sequences])
            # A layer that is recomputed runs again in the backward pass, when other micro-batches may have been forward in between; they
            # run again in the order in which they ran, so the first one is the measured one.
            again = not forward and place not in self._run_again
            if again:
                self._run_again.add(place)
            if (again or looks and not recomputed) and hidden.requires_grad:
                hidden.register_hook(gradient_hook)

        return observe

    def _rows_of(self, what: str, part: str | tuple[str, str], measure: Callable, carry: int = 0) -> Rows:
        """Where the samples of one part of the model are collected: rows of one shape, measured by measure(part, ...)."""
        if (what, part) not in self._rows:
            self._rows[what, part] = Rows(lambda places, rows, carried: measure(part, places, rows, carried), carry)
        return self._rows[what, part]

    def _on_units(self, stack: str, place: int, layer: Layer) -> Callable:
        rows = self._rows_of("units", stack, self._measure_units)

        def hook(module, arguments) -> None:
            if self.recording and self._is_forward(layer):
                units = arguments[0].detach()  # [s, b, f]
                rows.add(place, units[::max(1, units.size(0) // TOKENS), 0])

        return hook

    def _on_attention(self, kind: tuple[str, str], place: int, layer: Layer) -> Callable:
        rows = self._rows_of("attention", kind, self._measure_attention)

        def hook(module, arguments, named) -> None:
            if not (self.recording and self._is_forward(layer)):
                return
            query, key, _, mask = arguments
            if query.size(0) < 2:
                return  # token by token: no logits to speak of
            chosen = slice(None, None, max(1, query.size(0) // QUERIES))
            if kind not in self._visible:
                self._visible[kind] = _visible(mask, range(query.size(0))[chosen], key.size(0), "causal" in str(named.get("attn_mask_type")),
                                               query.device)
                self._scale[kind] = module.softmax_scale or query.size(-1) ** -0.5
            rows.add(place, query.detach()[chosen, 0], key.detach()[:, 0])

        return hook

    # What is measured of a block of layers.

    def _measure_stream(self, stack: str, places: list[int], rows: tuple[torch.Tensor], carried: int) -> None:
        x, real = rows[0], self._real.get(stack)
        sums, norms = stream_sums(x, real)
        own = carried + (places[carried] == self._borrowed)
        if own < len(places):
            self._add(places[own:], _FORWARD, sums[own:] * self._share)
        ends = [row for row, place in enumerate(places) if row >= max(carried, self._layer_ends.get(place, len(places)))]
        if ends:
            step = self._layer_ends[places[ends[0]]]  # additions of a layer, so its end comes every so many rows
            last, before = slice(ends[0], ends[-1] + 1, step), slice(ends[0] - step, ends[-1] + 1 - step, step)
            if len(ends) != len(range(ends[0], ends[-1] + 1, step)):  # but not across two forward passes
                last, before = ends, [row - step for row in ends]
            self._add([places[row] for row in ends], _ANGLE, angles(x[last], norms[last], x[before], norms[before], real) * self._share)

    def _measure_gradient(self, stack: str, places: list[int], rows: tuple[torch.Tensor], carried: int) -> None:
        self._add(places, _GRADIENT, stream_sums(rows[0], self._real.get(stack))[0] * self._share)

    def _measure_units(self, stack: str, places: list[int], rows: tuple[torch.Tensor], carried: int) -> None:
        self._add(places, _DEAD, dead_sums(rows[0].abs().amax(dim=1).float()))

    def _measure_attention(self, kind: tuple[str, str], places: list[int], rows: tuple[torch.Tensor, torch.Tensor], carried: int) -> None:
        seen, mask = self._visible[kind]
        sums, largest = attention_sums(*rows, mask, seen, self._scale[kind])
        self._add(places, _ATTENTION, sums)
        index = torch.tensor(places, device=self._device)
        self._largest[index] = torch.maximum(self._largest[index], largest.float())

    def _add(self, places: list[int], column: int, found: torch.Tensor) -> None:
        index = torch.tensor(places, device=self._device)
        self._sums[:, column:column + found.size(1)].index_add_(0, index, found)

    # What comes out.

    def read(self, iteration: int, parameters: dict[str, dict[str, float]] | None = None) -> SignalRecord:
        """The record of what was measured since the last `read`, on all ranks together."""
        sums, largest = add_up_signal(self._sums, self._largest)
        record = SignalRecord(iteration, _values(sums.cpu().numpy(), largest.cpu().numpy()), parameters or {})
        self._reset()
        return record


def _visible(mask, queries: range, keys: int, causal: bool, device: torch.device) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(which keys the sampled queries of the first sequence see [q, t], what is added to their scores [1 or n, q, t] or None)."""
    query, key = torch.tensor(queries, device=device), torch.arange(keys, device=device)
    if isinstance(mask, BlockMask):
        return mask.mask_mod(torch.zeros_like(query[:, None]), 0, query[:, None], key), None
    if mask is None:
        every = torch.ones(len(query), keys, dtype=torch.bool, device=device)
        return (key <= query[:, None] if causal else every), None
    rows = mask.detach()[0].expand(-1, max(queries) + 1 if mask.size(2) == 1 else -1, -1)[:, query]
    return (rows > -torch.inf).all(dim=0), rows


def _values(sums: np.ndarray, largest: np.ndarray) -> dict[str, np.ndarray]:
    second, mean, correlation = stream_means(sums[:, _FORWARD:_GRADIENT])
    gradient, _, gradient_correlation = stream_means(sums[:, _GRADIENT:_ATTENTION])
    variance, entropy, queries = sums[:, _ATTENTION:_DEAD].T
    dead, units = sums[:, _DEAD:_ANGLE].T
    angle, tokens = sums[:, _ANGLE:].T
    return {
        "forward_second_moment": second, "forward_mean": mean, "token_correlation": correlation,
        "gradient_variance": divided(gradient, np.full(len(gradient), gradient[-1])), "gradient_correlation": gradient_correlation,
        "attention_logit_variance": divided(variance, queries), "attention_logit_max": np.where(np.isfinite(largest), largest, np.nan),
        "attention_entropy": divided(entropy, queries), "dead_activations": divided(dead, units), "angular_distance": divided(angle, tokens),
    }
