"""Attention masks: causal, bidirectional and prefix, over padded and packed sequences, all from one rule, made once for all layers.

A query sees a key if both lie in the same segment and the key is not in the query's future. Segments number the documents of
a packed sequence from 1; padding is segment 0, so it sees and is seen by padding alone and no row is ever empty. A prefix is
seen by everyone (within its segment). Where segments and prefixes play no part there is no mask at all: SDPA then takes its
own causal or full fast path.

A mask has the form in which the attention kernel keeps it for the backward pass, so that all layers of a stack keep one and the
same: numbers to add to the scores (SDPA turns a boolean mask into such a tensor anew in every layer), or, where there is a GPU
and the rule is all there is, flex_attention's BlockMask, which needs no memory for single scores. Soft-capped scores take the
BlockMask there also where nothing but the kind of attention rules.

Shape letters: s queries, t keys, b micro-batch, n heads of this rank.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from megadsl.config.model import ModelConfig
from megadsl.model.activations import Activations

Mask = torch.Tensor | BlockMask
# (sequence, head, query, key) -> whether the query sees the key: numbers, or tensors of them that are broadcast.
Rule = Callable[..., torch.Tensor]
# CUDA's memory-efficient kernel copies a mask whose rows do not start at multiples of so many elements, in every layer.
ALIGNMENT = 16
# flex_attention works in blocks of 128 x 128; below that, and token by token, a dense mask is small.
BLOCK = 128


def visibility(causal: bool, offset: int = 0, key_segments: torch.Tensor | None = None, query_segments: torch.Tensor | None = None,
               prefix_length: torch.Tensor | None = None) -> Rule:
    """Who sees whom.

    Args:
        causal: keys after the query are hidden.
        offset: keys before the first query (of a key/value cache).
        key_segments: [b, t]; None: all keys are of one segment.
        query_segments: [b, s]; None: queries look for segment 1 (the unpadded part of a memory).
        prefix_length: [b] keys at the front that are not hidden by causality.
    """
    def sees(sequence, head, query, key) -> torch.Tensor:
        seen = query + offset >= key if causal else key >= 0
        if prefix_length is not None:
            seen = seen | (key < prefix_length[sequence])
        if key_segments is not None:
            wanted = 1 if query_segments is None else query_segments[sequence, query]
            seen = seen & (key_segments[sequence, key] == wanted)
        return seen

    return sees


def visible(sees: Rule, batch: int, queries: int, keys: int, device: torch.device, first: int = 0) -> torch.Tensor:
    """The rule for every pair, [b or 1, 1, s or 1, t]: sequences and queries that do not differ have one row. `first`: query."""
    sequence, query, key = (torch.arange(size, device=device) for size in (batch, queries, keys))
    seen = sees(sequence[:, None, None], 0, query[:, None] + first, key)
    return seen.view(-1, 1, *seen.shape[-2:])


def additive(seen: torch.Tensor | None, dtype: torch.dtype, bias: torch.Tensor | None = None) -> torch.Tensor:
    """What is added to the scores [b, n, s, t]: 0, or `bias` [1, n, s, t], where the key is seen (None: everywhere), else -inf."""
    mask = torch.zeros((), dtype=dtype, device=seen.device) if bias is None else bias.to(dtype)
    if seen is not None:
        mask = mask.masked_fill(~seen, -torch.inf)
    missing = -mask.size(-1) % ALIGNMENT
    return F.pad(mask, (0, missing))[..., :-missing] if missing else mask


def blockwise(model: ModelConfig, device: torch.device, dtype: torch.dtype, queries: int, bias: torch.Tensor | None) -> bool:
    """Whether a mask is for flex_attention: the only place that chooses.

    It has no dropout, wants heads of at least 16, and gives a trained bias no gradient that costs less than the scores; on a CPU it
    has no backward pass. In fp32 its tiles do not fit every GPU.
    """
    return (
        device.type == "cuda" and dtype != torch.float32 and queries >= BLOCK and model.head_dim >= 16
        and model.attention_dropout == 0.0 and bias is None
    )


class Masks:
    """Masks of self- and cross-attention for the layers of one stack, made at the first layer of a forward pass and shared by all,
    also where they recompute.

    Args:
        causal: a decoder's stack.
        isolated: documents packed into one sequence do not see each other. (Padding is never seen.)
    """

    def __init__(self, model: ModelConfig, causal: bool, isolated: bool):
        self.model, self.causal, self.isolated = model, causal, isolated
        self._own, self._memory = Remembered(self._make), Remembered(self._make)

    def __call__(self, value: Activations) -> tuple[Mask | None, Mask | None]:
        """What flows into a layer -> its masks (None: all that the kind of attention allows is seen)."""
        hidden = value.hidden
        shape = hidden.size(0), hidden.size(1), hidden.dtype, hidden.device
        segments = value.get("segments") if self.isolated else None
        source = value.get("source_segments")
        if "memory" in value:
            memory = self._memory(*shape, False, source, None, None, None, value["memory"].size(0))
        else:
            memory, segments = None, segments if source is None else source
        own = self._own(*shape, self.causal, segments, segments, value.get("prefix_length"), value.get("position_bias"))
        return own, memory

    def _make(self, queries: int, batch: int, dtype: torch.dtype, device: torch.device, causal: bool,
              key_segments: torch.Tensor | None, query_segments: torch.Tensor | None, prefix_length: torch.Tensor | None,
              bias: torch.Tensor | None, memory_length: int | None = None) -> Mask | None:
        ruled = key_segments is not None or prefix_length is not None
        # SDPA has fast paths without a mask, but caps no scores: flex_attention does, and goes by a BlockMask.
        capped = self.model.attention_logit_softcap and blockwise(self.model, device, dtype, queries, bias)
        if not ruled and bias is None and not capped:
            return None
        keys = memory_length or queries if key_segments is None else key_segments.size(1)
        if bias is not None:
            keys = bias.size(-1)
        if not ruled and not causal and not capped:
            return additive(None, dtype, bias)
        sees = visibility(causal, max(0, keys - queries) if causal else 0, key_segments, query_segments, prefix_length)
        if blockwise(self.model, device, dtype, queries, bias):
            return create_block_mask(sees, batch, None, queries, keys, device=device)
        return additive(visible(sees, batch, queries, keys, device), dtype, bias)


def positions_in_segments(segments: torch.Tensor) -> torch.Tensor:
    """Position of every token within its segment: segments [b, s] -> [b, s], 0 at each segment's start."""
    position = torch.arange(segments.size(1), device=segments.device).expand_as(segments)
    starts = torch.ones_like(segments, dtype=torch.bool)
    starts[:, 1:] = segments[:, 1:] != segments[:, :-1]
    return position - torch.where(starts, position, 0).cummax(dim=1).values


class Remembered:
    """A function of tensors that keeps its last result: all layers of a stack ask for the same mask.

    Tensors count as equal if they are the same memory and were not written to: comparing values would cost more than the mask.
    (Not the same object: ZeRO 3 hands them from layer to layer through its own autograd functions.)
    """

    def __init__(self, function: Callable):
        self._function = function
        self._arguments: tuple = ()
        self._versions: tuple = ()
        self._result = None

    def __call__(self, *arguments):
        versions = tuple(map(_version, arguments))
        if len(arguments) != len(self._arguments) or versions != self._versions or not all(map(_same, arguments, self._arguments)):
            self._result = None  # before the next one is made: there is room for one
            self._result = self._function(*arguments)
            self._arguments, self._versions = arguments, versions
        return self._result


def _same(new, old) -> bool:
    if not isinstance(new, torch.Tensor) or not isinstance(old, torch.Tensor):
        return type(new) is type(old) and new == old
    # The old one is held here, so nobody else can have been given its memory.
    return (new.data_ptr(), new.shape, new.stride(), new.dtype) == (old.data_ptr(), old.shape, old.stride(), old.dtype)


def _version(argument) -> int:
    # Tensors made in inference mode do not count what is written to them; nothing writes to them either.
    return argument._version if isinstance(argument, torch.Tensor) and not argument.is_inference() else 0
