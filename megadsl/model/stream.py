"""What flows from entry to entry of a model's list: the hidden state alone, or a tuple (hidden, *context).

The context is what layers further down need besides the hidden state: segments, the encoder's memory, target tokens that
wait for the decoder. Its names and their order follow from the configuration, so every pipeline stage knows them; the last
ones may be missing, where a caller has nothing to say in them (generation from one prompt has no segments).

Shape letters: s sequence, b micro-batch, h hidden.
"""

import torch

Context = dict[str, torch.Tensor]


def unpack(value: torch.Tensor | tuple, names: tuple[str, ...]) -> tuple[torch.Tensor, Context]:
    """A stream -> (hidden, context by name)."""
    if isinstance(value, torch.Tensor):
        return value, {}
    return value[0], dict(zip(names, value[1:], strict=False))


def pack(hidden: torch.Tensor, context: Context) -> torch.Tensor | tuple:
    """Inverse of `unpack`."""
    return (hidden, *context.values()) if context else hidden


def hidden_of(value: torch.Tensor | tuple) -> torch.Tensor:
    """The hidden state of a stream."""
    return value if isinstance(value, torch.Tensor) else value[0]


def with_hidden(value: torch.Tensor | tuple, hidden: torch.Tensor) -> torch.Tensor | tuple:
    """The same stream with another hidden state."""
    return hidden if isinstance(value, torch.Tensor) else (hidden, *value[1:])
