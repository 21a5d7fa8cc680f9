"""How our tensors appear in another library: a list of rules, each read in both directions (export: split, import: join).

Shape letters: h hidden, n heads, g query groups, d head size, f FFN size, v vocabulary, s positions.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from megadsl.config.model import ModelConfig
from megadsl.errors import UserError


@dataclass(frozen=True)
class Rule:
    """One tensor of ours and its parts over there; `ours` None: they hold a constant that we do without."""

    ours: str | None
    theirs: tuple[str, ...]
    split: Callable[[torch.Tensor | None], Sequence[torch.Tensor]]
    join: Callable[[Sequence[torch.Tensor]], torch.Tensor] | None = None


class TensorMap:
    """Collects the rules of one model.

    Args:
        model: the shape; where it has no biases and `their_biases` are wanted, zeros are written.
        vocab_size: rows of the other library's vocabulary; ours is padded to `padded_vocab_size`.
    """

    def __init__(self, model: ModelConfig, vocab_size: int, padded_vocab_size: int, their_biases: bool):
        self.model, self.vocab_size, self.padded_vocab_size = model, vocab_size, padded_vocab_size
        self.their_biases = their_biases
        self.rules: list[Rule] = []

    def export(self, weights: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
        """(their name, tensor) from plain weights by our names."""
        for rule in self.rules:
            parts = rule.split(None if rule.ours is None else weights[rule.ours])
            yield from zip(rule.theirs, (part.contiguous() for part in parts), strict=True)

    def read(self, tensors: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
        """(our name, plain tensor) from theirs; UserError naming one that is missing or that we have no place for."""
        for rule in self.rules:
            if rule.ours is None:
                for name in rule.theirs:
                    if name in tensors and tensors[name].any():
                        raise UserError(f"The model's tensor {name} is not zero, and has no counterpart here.")
            else:
                missing = [name for name in rule.theirs if name not in tensors]
                if missing:
                    raise UserError(f"The model has no tensor {missing[0]}; it is not complete or of another architecture.")
                yield rule.ours, rule.join([tensors[name].float() for name in rule.theirs]).contiguous()

    def tensor(self, ours: str, theirs: str, scale: float = 1.0, transposed: bool = False) -> None:
        """The same numbers (times `scale`), as a matrix transposed where theirs is [in, out]."""
        def turn(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.T if transposed and tensor.dim() == 2 else tensor

        self.rules.append(Rule(ours, (theirs,), lambda t: [turn(t) * scale], lambda parts: turn(parts[0]) / scale))

    def constant(self, theirs: str, *shape: int) -> None:
        """Zeros over there."""
        self.rules.append(Rule(None, (theirs,), lambda _: [torch.zeros(shape)]))

    def norm(self, ours: str, theirs: str, scale: float = 1.0) -> None:
        """Gain and, of a LayerNorm, bias."""
        self.tensor(f"{ours}.weight", f"{theirs}.weight", scale)
        if self.model.normalization == "LayerNorm":
            self.tensor(f"{ours}.bias", f"{theirs}.bias", scale)

    def linear(self, ours: str, theirs: str, outputs: int, transposed: bool = False) -> None:
        self.tensor(f"{ours}.weight", f"{theirs}.weight", transposed=transposed)
        if self.model.add_bias_linear:
            self.tensor(f"{ours}.bias", f"{theirs}.bias")
        elif self.their_biases:
            self.constant(f"{theirs}.bias", outputs)

    def vocabulary(self, ours: str, *theirs: str, scale: float = 1.0) -> None:
        """Rows of the vocabulary, in every tensor of `theirs`: those end with the tokenizer's last piece, ours go on with zeros."""
        padding = self.padded_vocab_size - self.vocab_size

        def join(parts: Sequence[torch.Tensor]) -> torch.Tensor:
            rows = parts[0] / scale
            return F.pad(rows, (0, 0, 0, padding) if rows.dim() == 2 else (0, padding))

        self.rules.append(Rule(ours, theirs, lambda t: [t[:self.vocab_size] * scale] * len(theirs), join))

    def positions(self, ours: str, theirs: str, rows: int, their_rows: int, offset: int = 0) -> None:
        """A table of `rows` positions in theirs of offset + `their_rows`; rows that we have not are zeros."""
        padding = (0, 0, offset, their_rows - rows)
        self.rules.append(Rule(ours, (theirs,), lambda t: [F.pad(t, padding)], lambda parts: parts[0][offset:offset + rows]))

    def query_key_value(self, ours: str, theirs: tuple[str, str, str], query_scale: float = 1.0) -> None:
        """Three linears; Megatron stores, group after group, the queries of the group, its key and its value."""
        d, g = self.model.head_dim, self.model.query_groups
        self._stacked(ours, theirs, g, (self.model.num_attention_heads // g * d, d, d), query_scale)

    def key_value(self, ours: str, theirs: tuple[str, str]) -> None:
        """Two linears; Megatron stores, head after head, its key and its value."""
        self._stacked(ours, theirs, self.model.num_attention_heads, (self.model.head_dim,) * 2)

    def _stacked(self, ours: str, theirs: tuple[str, ...], groups: int, rows: tuple[int, ...], first_scale: float = 1.0) -> None:
        scales = (first_scale, *[1.0] * (len(rows) - 1))

        def split(tensor: torch.Tensor) -> list[torch.Tensor]:
            parts = tensor.view(groups, sum(rows), -1).split(rows, dim=1)
            shape = (-1,) if tensor.dim() == 1 else (-1, tensor.size(1))
            return [part.reshape(shape) * scale for part, scale in zip(parts, scales, strict=True)]

        def join(parts: Sequence[torch.Tensor]) -> torch.Tensor:
            shape = (-1,) if parts[0].dim() == 1 else (-1, parts[0].size(1))
            grouped = [part.view(groups, count, -1) / scale for part, count, scale in zip(parts, rows, scales, strict=True)]
            return torch.cat(grouped, dim=1).reshape(shape)

        self._with_bias(ours, theirs, split, join, [groups * count for count in rows])

    def fused_query_key_value(self, ours: str, theirs: str) -> None:
        """One [h, 3h] matrix of all queries, all keys, all values (GPT-2)."""
        n, d = self.model.num_attention_heads, self.model.head_dim

        def regroup(tensor: torch.Tensor, outer: int, inner: int) -> torch.Tensor:
            return tensor.view(outer, inner, d, -1).transpose(0, 1).reshape(tensor.shape)

        self.rules.append(Rule(f"{ours}.weight", (f"{theirs}.weight",), lambda t: [regroup(t, n, 3).T],
                               lambda parts: regroup(parts[0].T.contiguous(), 3, n)))
        if self.model.add_bias_linear:
            self.rules.append(Rule(f"{ours}.bias", (f"{theirs}.bias",), lambda t: [regroup(t, n, 3)],
                                   lambda parts: regroup(parts[0], 3, n)))
        else:
            self.constant(f"{theirs}.bias", 3 * n * d)

    def gate_up(self, ours: str, theirs: tuple[str, str]) -> None:
        """The halves of a gated fc1."""
        self._with_bias(ours, theirs, lambda t: t.chunk(2), torch.cat, [self.model.ffn_size] * 2)

    def _with_bias(self, ours: str, theirs: tuple[str, ...], split: Callable, join: Callable, outputs: list[int]) -> None:
        self.rules.append(Rule(f"{ours}.weight", tuple(f"{name}.weight" for name in theirs), split, join))
        if self.model.add_bias_linear:
            self.rules.append(Rule(f"{ours}.bias", tuple(f"{name}.bias" for name in theirs), split, join))
        elif self.their_biases:
            for name, size in zip(theirs, outputs, strict=True):
                self.constant(f"{name}.bias", size)
