"""The key/value cache of generation: Megatron-core's own, which its attention fills and reads, and that of cross-attention."""

import torch
from megatron.core.inference.contexts import StaticInferenceContext


class KeyValueCache(StaticInferenceContext):
    """Keys and values of all layers for `num_samples` sequences of at most `max_length` tokens.

    Attributes:
        memory: by layer number, keys and values of an encoder's output, which the first step makes and all later ones read.
    """

    def __init__(self, num_samples: int, max_length: int):
        super().__init__(num_samples, max_length)
        self.memory: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    @property
    def length(self) -> int:
        """Tokens that are cached."""
        return self.sequence_len_offset

    def advance(self, tokens: int) -> None:
        """Count tokens that all layers have now seen."""
        self.sequence_len_offset += tokens
