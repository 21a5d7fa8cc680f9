"""Attention masks: causal, bidirectional and prefix, over padded and packed sequences, all from one rule.

A query sees a key if both lie in the same segment and the key is not in the query's future. Segments number the documents of
a packed sequence from 1; padding is segment 0, so it sees and is seen by padding alone and no row is ever empty. A prefix is
seen by everyone (within its segment). Where segments and prefixes play no part there is no mask at all: SDPA then takes its
own causal or full fast path.

Shape letters: s query length, t key length, b micro-batch.
"""

from collections.abc import Callable

import torch


def attention_mask(causal: bool, length: int, device: torch.device, key_segments: torch.Tensor | None = None,
                   query_segments: torch.Tensor | None = None, prefix_length: torch.Tensor | None = None,
                   always: bool = False) -> torch.Tensor | None:
    """The mask of queries over keys, True where a key is hidden: [b or 1, 1, s, t], or None where SDPA needs none.

    Args:
        causal: keys after the query are hidden.
        length: s (and t) of a causal mask.
        key_segments: [b, t]; None: all keys are of one segment.
        query_segments: [b, s]; None: queries look for segment 1 (the unpadded part of a memory).
        prefix_length: [b] keys at the front that are not hidden by causality.
        always: make the mask even where SDPA would not need it (a bias on the scores takes SDPA's mask slot).
    """
    if key_segments is None and prefix_length is None and not (always and causal):
        return None
    hidden = None
    if causal:
        position = torch.arange(length, device=device)
        hidden = (position[None, :] > position[:, None])[None, None]
        if prefix_length is not None:
            hidden = hidden & (position >= prefix_length[:, None])[:, None, None, :]
    if key_segments is not None:
        wanted = 1 if query_segments is None else query_segments[:, None, :, None]
        other = key_segments[:, None, None, :] != wanted
        hidden = other if hidden is None else hidden | other
    return hidden


def positions_in_segments(segments: torch.Tensor) -> torch.Tensor:
    """Position of every token within its segment: segments [b, s] -> [b, s], 0 at each segment's start."""
    position = torch.arange(segments.size(1), device=segments.device).expand_as(segments)
    starts = torch.ones_like(segments, dtype=torch.bool)
    starts[:, 1:] = segments[:, 1:] != segments[:, :-1]
    return position - torch.where(starts, position, 0).cummax(dim=1).values


class Remembered:
    """A function of tensors that keeps its last result: all layers of a stack ask for the same mask."""

    def __init__(self, function: Callable):
        self._function = function
        self._arguments: tuple = ()
        self._result = None

    def __call__(self, *arguments):
        if len(arguments) != len(self._arguments) or not all(map(_same, arguments, self._arguments)):
            self._arguments, self._result = arguments, self._function(*arguments)
        return self._result


def _same(new, old) -> bool:
    # Tensors by identity: comparing their values would cost more than the mask.
    return new is old or not isinstance(new, torch.Tensor) and not isinstance(old, torch.Tensor) and new == old
