"""The canonical state of a run out of DeepSpeed's engine and into it: full fp32 tensors by parameter name, whatever the layout.

A fragment is what a rank's optimizer holds of one parameter: a range of the flattened tensor-parallel shard. ZeRO 0 holds
shards whole and on every data rank, ZeRO 1 to 3 hold ranges. To save, every parameter is assembled on one rank out of the ranks
of its stage; to load, each rank reads the ranges that its optimizer holds from the files and what all data ranks hold is sent
among them: together they read every number once, and no rank ever holds the model.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod

import torch
import torch.distributed as dist

from megadsl.checkpoint.weights import KINDS, TensorReader
from megadsl.errors import UserError
from megadsl.model.init import ParameterTag, tag_of
from megadsl.parallel.exchange import broadcast_from, shares
from megadsl.parallel.groups import data_group, stage_group
from megadsl.parallel.topology import Coordinate, Topology

BATCH_BYTES = 64 << 20  # assembled by a writer at a time


@dataclass(frozen=True)
class Fragment:
    """Numbers [start, start + count) of the flattened shard of one parameter, in the flat tensor that the optimizer steps."""

    name: str
    parameter: torch.nn.Parameter
    tag: ParameterTag
    start: int
    count: int
    flat: torch.Tensor
    offset: int

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """This fragment of `flat` or of a moment that is shaped like it."""
        return tensor.detach().view(-1).narrow(0, self.offset, self.count)


class EngineState:
    """The canonical state of one DeepSpeed engine (training/engine.py makes it)."""

    def __init__(self, engine, parameters: list[tuple[str, torch.nn.Parameter]], zero_stage: int, topology: Topology,
                 coordinate: Coordinate, device: torch.device):
        self._engine, self._zero_stage, self._device = engine, zero_stage, device
        self._topology, self._coordinate = topology, coordinate
        self.fragments = [self._fragment(name, parameter) for name, parameter in parameters]
        self._adam = engine.optimizer if zero_stage == 0 else engine.optimizer.optimizer
        self._exchange: _Exchange | None = None

    def _fragment(self, name: str, parameter: torch.nn.Parameter) -> Fragment:
        value, optimizer = tag_of(name, parameter), self._engine.optimizer
        if self._zero_stage == 0:
            return Fragment(name, parameter, value, 0, parameter.numel(), parameter, 0)
        if self._zero_stage == 3:
            group, offset, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
            start = self._coordinate.data * size
            count = max(0, min(size, parameter.ds_numel - start))  # the last ranks' parts are padded
            return Fragment(name, parameter, value, start, count, optimizer.fp32_partitioned_groups_flat[group], offset)
        mapping = parameter._hp_mapping  # None: other data ranks hold it
        if mapping is None:
            return Fragment(name, parameter, value, 0, 0, parameter, 0)
        flat = optimizer.optimizer.param_groups[mapping.param_group_index]["params"][0]
        lp, hp = mapping.lp_fragment_address, mapping.hp_fragment_address
        return Fragment(name, parameter, value, lp.start, lp.numel, flat, hp.start)

    def steps(self) -> int:
        """Updates that Adam has made."""
        found = {int(state["step"]) for state in self._adam.state.values() if "step" in state}
        if len(found) > 1:
            raise RuntimeError(f"parameters were updated a different number of times: {sorted(found)}")
        return found.pop() if found else 0

    def loss_scaler(self) -> dict[str, float]:
        """The state of fp16's dynamic loss scale; empty without one."""
        scaler = getattr(self._engine.optimizer, "loss_scaler", None)
        return {name: value for name, value in vars(scaler).items() if type(value) in (int, float, bool)} if scaler else {}

    def tensors(self, kinds: tuple[str, ...] = KINDS) -> Iterator[tuple[str, str, torch.Tensor]]:
        """(kind, name, full fp32 tensor on the host) of what this rank writes; to be consumed on all ranks together."""
        if self._exchange is None:
            self._exchange = _Exchange(self.fragments, self._zero_stage, self._topology, self._coordinate)
        for kind in kinds:
            for name, tensor in self._exchange.assemble(lambda fragment: self._values(kind, fragment), self._device):
                yield kind, name, tensor

    def _values(self, kind: str, fragment: Fragment) -> torch.Tensor:
        if kind == "weights":
            return fragment.of(fragment.flat)
        state = self._adam.state.get(fragment.flat, {})
        return fragment.of(state[kind]) if kind in state else torch.zeros(fragment.count, device=fragment.flat.device)

    @torch.no_grad()
    def load(self, reader: TensorReader, steps: int | None, loss_scaler: dict[str, float], partial: bool = False) -> None:
        """Fill weights and, unless `steps` is None, Adam's state. 16-bit weights become the rounded master weights.

        `partial`: parameters that the reader has not stay as they are.
        """
        expected = {fragment.name for fragment in self.fragments}
        if self._topology.pipeline == 1 and (foreign := set(reader.names("weights")) - expected):
            raise UserError(f"{reader.folder} holds tensors that the model has not, for example {min(foreign)}.")
        held = set(reader.names("weights"))
        fragments = [fragment for fragment in self.fragments if not partial or fragment.name in held]
        for fragment in fragments:
            shape = reader.shape("weights", fragment.name)
            if shape != fragment.tag.full_shape:
                raise UserError(
                    f"{reader.folder}: {fragment.name} has shape {shape}, the model wants {fragment.tag.full_shape}."
                )
        self._load_kind("weights", reader, fragments, [fragment.of(fragment.flat) for fragment in fragments])
        self._spread_weights()
        if not steps:
            self._forget_moments()
            return
        for kind in KINDS[1:]:
            self._load_kind(kind, reader, fragments, [
                fragment.of(self._adam_state(fragment.flat, steps)[kind] if fragment.count else fragment.flat)
                for fragment in fragments
            ])
        scaler = getattr(self._engine.optimizer, "loss_scaler", None)
        for name, value in loss_scaler.items():
            if hasattr(scaler, name):
                setattr(scaler, name, value)

    @torch.no_grad()
    def scale_rows(self, factors: Mapping[torch.nn.Parameter, torch.Tensor]) -> None:
        """Multiply each row of this tensor-parallel rank's shards by its factor, in the optimizer's weights and in those that the
        model computes with. On all data ranks together, with the same factors."""
        for fragment in self.fragments:
            if fragment.count and (factor := factors.get(fragment.parameter)) is not None:
                row = prod(fragment.tag.shard_shape(self._topology.tensor)[1:])
                every = factor.repeat_interleave(row)[fragment.start:fragment.start + fragment.count]
                fragment.of(fragment.flat).mul_(every.to(fragment.flat))
        self._spread_weights()

    def _load_kind(self, kind: str, reader: TensorReader, fragments: list[Fragment], targets: list[torch.Tensor]) -> None:
        """Fill `targets`, which are the places of `fragments`. At ZeRO 0 all data ranks hold the same: each reads a share."""
        me, size = self._coordinate.data, self._topology.data
        shared = self._zero_stage == 0 and size > 1
        owners = shares([target.numel() for target in targets], size) if shared else [me] * len(targets)
        for fragment, target, owner in zip(fragments, targets, owners, strict=True):
            if owner == me and fragment.count:
                self._read(fragment, kind, reader, target)
        if shared:
            for owner in range(size):
                broadcast_from(owner, [target for target, own in zip(targets, owners, strict=True) if own == owner], data_group())

    def _spread_weights(self) -> None:
        """From the optimizer's weights to those that the model computes with, on all data ranks."""
        optimizer = self._engine.optimizer
        if self._zero_stage in (1, 2):
            optimizer.update_lp_params()  # as after a step: rounded where they are 16-bit, gathered from all data ranks
        elif self._zero_stage == 3:
            for fragment in self.fragments:
                fragment.parameter.ds_tensor.narrow(0, 0, fragment.count).copy_(fragment.of(fragment.flat))
            persistent = optimizer.persistent_parameters
            if persistent:  # small parameters are kept gathered: gather them anew
                persistent[0].partition(persistent)
                persistent[0].all_gather(persistent)

    def _adam_state(self, flat: torch.Tensor, steps: int) -> dict:
        state = self._adam.state[flat]
        if "exp_avg" not in state:
            state.update({kind: torch.zeros_like(flat) for kind in KINDS[1:]})
        state["step"] = torch.tensor(float(steps), device=flat.device)
        return state

    def _forget_moments(self) -> None:
        """As before the first step: an engine that has trained may go back to a checkpoint without any."""
        for state in self._adam.state.values():
            for tensor in state.values():
                tensor.zero_()

    def _read(self, fragment: Fragment, kind: str, reader: TensorReader, target: torch.Tensor) -> None:
        """Copy a fragment from its file: the rows that it touches of the parts that this tensor-parallel rank holds."""
        value, size = fragment.tag, self._topology.tensor
        row = prod(value.shard_shape(size)[1:])
        first, end = fragment.start // row, -(-(fragment.start + fragment.count) // row)
        parts, done = [], 0
        for rows, *others in value.slices(self._coordinate.tensor, size):
            length = rows.stop - rows.start
            low, high = max(first - done, 0), min(end - done, length)
            if low < high:
                part = reader.part(kind, fragment.name, (slice(rows.start + low, rows.start + high), *others))
                parts.append(part.reshape(-1))
            done += length
        found = torch.cat(parts) if len(parts) > 1 else parts[0]
        target.copy_(found[fragment.start - first * row:][:fragment.count])


class _Exchange:
    """Who holds what and who assembles what, agreed once by the ranks of a stage."""

    def __init__(self, fragments: list[Fragment], zero_stage: int, topology: Topology, coordinate: Coordinate):
        self._group = stage_group()
        self._ranks = dist.get_process_group_ranks(self._group)
        self._coordinates = [topology.coordinate(rank) for rank in self._ranks]
        self._me, self._topology, self._all = self._ranks.index(dist.get_rank()), topology, fragments
        mine = []
        for index, fragment in enumerate(fragments):
            replica = fragment.tag.partition_dim is None and coordinate.tensor > 0
            # At ZeRO 0 every data rank holds everything: they take turns.
            replica |= zero_stage == 0 and index % topology.data != coordinate.data
            # A tied parameter is written by the stage that comes first.
            if fragment.count and not replica and not getattr(fragment.parameter, "ds_pipe_replicated", False):
                mine.append((index, fragment.start, fragment.count))
        self._held: list[list[tuple[int, int, int]]] = [None] * len(self._ranks)
        dist.all_gather_object(self._held, mine, group=self._group)
        self._batches = self._share_out()

    def _share_out(self) -> list[list[set[int]]]:
        """Batches by writer: consecutive parameters of about equal size for each, in batches of bounded size."""
        wanted = sorted({index for held in self._held for index, _, _ in held})
        sizes = {index: torch.Size(self._all[index].tag.full_shape).numel() * 4 for index in wanted}
        batches: list[list[set[int]]] = [[] for _ in self._ranks]
        filled = dict.fromkeys(range(len(self._ranks)), BATCH_BYTES)
        for index, writer in zip(wanted, shares(list(sizes.values()), len(self._ranks)), strict=True):
            if filled[writer] + sizes[index] > BATCH_BYTES:
                batches[writer].append(set())
                filled[writer] = 0
            batches[writer][-1].add(index)
            filled[writer] += sizes[index]
        return batches

    def assemble(self, values, device: torch.device) -> Iterator[tuple[str, torch.Tensor]]:
        for turn in range(max(map(len, self._batches))):
            wanted = [own[turn] if turn < len(own) else set() for own in self._batches]
            pieces = [[piece for piece in self._held[self._me] if piece[0] in want] for want in wanted]
            arriving = [[piece for piece in held if piece[0] in wanted[self._me]] for held in self._held]
            sent = [values(self._all[index]).to(device) for own in pieces for index, _, _ in own]
            sending = torch.cat(sent) if sent else torch.empty(0, device=device)
            if len(self._ranks) > 1:
                received = torch.empty(sum(count for own in arriving for _, _, count in own), device=device)
                dist.all_to_all_single(
                    received, sending, [sum(count for _, _, count in own) for own in arriving],
                    [sum(count for _, _, count in own) for own in pieces], group=self._group,
                )
            else:
                received = sending
            yield from self._unpack(received.cpu(), arriving)

    def _unpack(self, received: torch.Tensor, arriving: list[list[tuple[int, int, int]]]) -> Iterator[tuple[str, torch.Tensor]]:
        shards: dict[int, dict[int, torch.Tensor]] = {}
        position = 0
        for coordinate, pieces in zip(self._coordinates, arriving, strict=True):
            for index, start, count in pieces:
                by_rank = shards.setdefault(index, {})
                if coordinate.tensor not in by_rank:
                    by_rank[coordinate.tensor] = torch.empty(self._all[index].tag.shard_shape(self._topology.tensor))
                by_rank[coordinate.tensor].view(-1)[start:start + count] = received[position:position + count]
                position += count
        for index in sorted(shards):
            by_rank = shards.pop(index)
            yield self._all[index].name, self._all[index].tag.unshard([by_rank[rank] for rank in sorted(by_rank)])
