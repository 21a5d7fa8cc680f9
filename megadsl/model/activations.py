"""What flows from layer to layer: tensors by name, in a fixed order.

"hidden" is the hidden state; the rest is context that layers further down need beside it: segments, the encoder's memory, target
tokens that wait for the decoder. A model starts from the tensors of a batch ("tokens", ...) and ends with the head's ("logits",
...). Only at the border of two pipeline stages is it a tuple, because DeepSpeed sends tensors and tuples; the names that cross are
those that the layer behind the border takes (stack.py).

Shape letters: s sequence, b micro-batch, h hidden.
"""

import torch


class Activations(dict[str, torch.Tensor]):
    """Named tensors. Layers return a new record and leave the one that they were given as it is.

    A dict, because DeepSpeed's hooks (ZeRO 3 gathers a layer's parameters by them) look for tensors in tuples, lists and dicts.
    """

    @property
    def hidden(self) -> torch.Tensor:
        """The hidden state [s, b, h]."""
        return self["hidden"]

    def replace(self, **tensors: torch.Tensor) -> "Activations":
        """The same with these tensors set or added."""
        return Activations(self, **tensors)

    def without(self, *names: str) -> "Activations":
        """The same without these names, where they are there."""
        return Activations((name, tensor) for name, tensor in self.items() if name not in names)

    def only(self, *names: str) -> "Activations":
        """The named ones, where they are there."""
        return Activations((name, self[name]) for name in names if name in self)

    def to_stage(self, names: tuple[str, ...]) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """What is sent to a pipeline stage whose first layer takes `names`: a tuple in their order, or a single tensor."""
        if set(names) != set(self):
            raise RuntimeError(f"the next stage's first layer takes {', '.join(names)}, but {', '.join(self)} flow there")
        return self[names[0]] if len(names) == 1 else tuple(self[name] for name in names)

    @classmethod
    def from_stage(cls, value: torch.Tensor | tuple[torch.Tensor, ...], names: tuple[str, ...]) -> "Activations":
        """Inverse of `to_stage`."""
        return cls(zip(names, (value,) if isinstance(value, torch.Tensor) else value, strict=True))
