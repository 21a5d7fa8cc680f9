"""Perplexity and bits per byte of text under a decoder.

Documents are joined by end-of-document as in training and read in windows of seq_length tokens that do not overlap, so a
token sees at most seq_length - 1 tokens before it: an upper bound that is comparable between runs of one seq_length.
Shape letters: b windows, s sequence.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from megadsl.data.causal import segments_of
from megadsl.errors import UserError
from megadsl.inference.load import TrainedModel
from megadsl.model.loss import token_losses


@dataclass(frozen=True)
class Evaluation:
    """What `megadsl evaluate` prints. loss is in nats per token."""

    loss: float
    perplexity: float
    bits_per_byte: float
    tokens: int
    text_bytes: int

    def text(self) -> str:
        return (
            f"loss {self.loss:.4f} nats per token | perplexity {self.perplexity:.3f} | "
            f"{self.bits_per_byte:.4f} bits per byte | {self.tokens:,} tokens, {self.text_bytes:,} bytes"
        )


@torch.inference_mode()
def evaluate_perplexity(model: TrainedModel, tokens: np.ndarray, text_bytes: int, batch_size: int, max_tokens: int = 0) -> Evaluation:
    """Loss of every token of `tokens` [t]; the first one follows an end-of-document.

    Args:
        max_tokens: read only so many tokens (0: all); the bytes are then scaled by the share that was read.
    """
    if tokens.size == 0:
        raise UserError("There is no text to evaluate on.")
    share = 1.0
    if max_tokens and max_tokens < tokens.size:
        share, tokens = max_tokens / tokens.size, tokens[:max_tokens]
    total = 0.0
    for inputs, labels, mask in _windows(tokens, model.tokenizer.eod, model.config.model.seq_length, batch_size):
        inputs, labels, mask = (tensor.to(model.device) for tensor in (inputs, labels, mask))
        total += float((token_losses(model.stack(_with_context(model, inputs)), labels) * mask).double().sum())
    loss, size = total / tokens.size, share * text_bytes
    return Evaluation(loss, math.exp(min(loss, 700.0)), total / math.log(2) / max(1.0, size), int(tokens.size), round(size))


def _with_context(model: TrainedModel, tokens: torch.Tensor) -> torch.Tensor | tuple:
    """What the model reads besides the tokens [b, s]: documents are kept apart as in training; no prefix."""
    context = {
        "segments": lambda: torch.from_numpy(np.stack([segments_of(row, model.tokenizer.eod) for row in tokens.cpu().numpy()])),
        "prefix_length": lambda: torch.zeros(len(tokens), dtype=torch.long),
    }
    names = model.definition.inputs[1:]
    return (tokens, *(context[name]().to(model.device) for name in names)) if names else tokens


def _windows(tokens: np.ndarray, eod: int, seq_length: int, batch_size: int) -> Iterator[tuple[torch.Tensor, ...]]:
    """(inputs, labels, mask), each [b, s]; every token is a label once, the last window is padded and masked."""
    count = -(-tokens.size // seq_length)
    padding = np.full(count * seq_length - tokens.size, eod, dtype=np.int64)
    stream = np.concatenate([[eod], tokens, padding])
    mask = np.concatenate([np.ones(tokens.size, np.float32), np.zeros(padding.size, np.float32)]).reshape(count, seq_length)
    inputs, labels = stream[:-1].reshape(count, seq_length), stream[1:].reshape(count, seq_length)
    for start in range(0, count, batch_size):
        rows = slice(start, start + batch_size)
        yield tuple(torch.from_numpy(np.ascontiguousarray(array[rows])) for array in (inputs, labels, mask))
