"""A run that starts from another's weights: the trunk is taken, what has no counterpart is drawn, and a report says which.

Learned positions of another length are stretched linearly, or kept as far as they go (checkpoint.init_positions).
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from megadsl.checkpoint.store import Checkpoint
from megadsl.checkpoint.weights import TensorReader
from megadsl.config import Config
from megadsl.errors import UserError
from megadsl.model.init import tag_of
from megadsl.training.engine import Engine

_SHOWN = 3


class InitialWeights:
    """The weights of checkpoint.init_from.

    Attributes:
        filled: names that need not be drawn.
    """

    def __init__(self, checkpoint: Checkpoint, config: Config):
        self.checkpoint, self._interpolate = checkpoint, config.checkpoint.init_positions == "interpolate"
        names = checkpoint.manifest.tensor_files("weights")
        # Fresh rows of a position table are drawn; whether it needs any is known when its shape is.
        self.filled = frozenset(name for name in names if self._interpolate or not name.endswith(".position"))

    def load(self, engine: Engine) -> list[str]:
        """Fill the engine, on all ranks together; lines that say what was taken, what is fresh and what was left out.

        Raises:
            UserError: a parameter of the trunk has another shape.
        """
        with TensorReader(self.checkpoint.path, self.checkpoint.manifest) as reader:
            theirs = set(reader.names("weights"))
            wanted = dict(engine.parameter_tags())
            taken = _Taken(reader, {name for name in wanted if name in theirs})
            resized = []
            for name in sorted(taken.taken):
                tag, shape = wanted[name], reader.shape("weights", name)
                if shape == tag.full_shape:
                    continue
                if tag.role != "position_embedding":
                    raise UserError(
                        f"checkpoint.init_from {self.checkpoint.path}: {name} has shape {shape}, the model wants {tag.full_shape}; "
                        "only the length of learned positions may differ.")
                rows = tag.full_shape[0]
                drawn = tag.draw(engine.config.training.seed, name, 0, 1)
                taken.resized[name] = resized_positions(reader.tensor("weights", name), drawn, self._interpolate)
                how = "interpolated" if self._interpolate else f"{max(0, rows - shape[0])} rows fresh"
                resized.append(f"{name} from {shape[0]} to {rows} rows, {how}")
            engine.state.load(taken, None, {}, partial=True)
        fresh, left = engine.names_on_all_ranks(set(wanted) - theirs), theirs - engine.names_on_all_ranks(set(wanted))
        lines = [f"starting from the weights of {self.checkpoint.path}: {len(theirs - left)} tensors taken"
                 + f", {_examples(fresh, 'fresh')}" * bool(fresh) + f", {_examples(left, 'left out')}" * bool(left)]
        return [*lines, *(f"learned positions: {line}" for line in resized)]


class _Taken:
    """A reader of the tensors that are taken, some of them resized."""

    def __init__(self, reader: TensorReader, taken: set[str]):
        self.folder, self._reader, self.taken = reader.folder, reader, taken
        self.resized: dict[str, torch.Tensor] = {}

    def names(self, kind: str) -> list[str]:
        return sorted(self.taken)

    def shape(self, kind: str, name: str) -> tuple[int, ...]:
        return tuple(self.resized[name].shape) if name in self.resized else self._reader.shape(kind, name)

    def part(self, kind: str, name: str, index: tuple[slice, ...]) -> torch.Tensor:
        return self.resized[name][index] if name in self.resized else self._reader.part(kind, name, index)


def resized_positions(table: torch.Tensor, drawn: torch.Tensor, interpolate: bool) -> torch.Tensor:
    """A position table [rows, h] with the rows of `drawn` [new rows, h]: stretched, or the first ones kept and the others drawn."""
    if interpolate:
        return F.interpolate(table.T[None], size=len(drawn), mode="linear", align_corners=True)[0].T.contiguous()
    kept = min(len(table), len(drawn))
    return torch.cat([table[:kept], drawn[kept:]])


def _examples(names: set[str], word: str) -> str:
    shown = ", ".join(sorted(names)[:_SHOWN])
    return f"{len(names)} {word} ({shown}{', ...' if len(names) > _SHOWN else ''})"
