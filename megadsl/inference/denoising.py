"""Denoising loss and exact-span accuracy of an encoder-decoder.

A span counts as exact if each of its tokens is the likeliest one given the source and the true target tokens before it, so
that one wrong span does not spoil those behind it. Shape letters: b batch, t target length, v vocabulary.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch

from megadsl.inference.batches import objective_batches
from megadsl.inference.load import TrainedModel
from megadsl.model.loss import token_losses


@dataclass(frozen=True)
class DenoisingEvaluation:
    """What `megadsl evaluate` prints of an encoder-decoder. loss is in nats per target token."""

    loss: float
    perplexity: float
    tokens: int
    exact_span_accuracy: float
    spans: int

    def text(self) -> str:
        return (
            f"denoising loss {self.loss:.4f} nats per target token | perplexity {self.perplexity:.3f} ({self.tokens:,} tokens) | "
            f"exact-span accuracy {self.exact_span_accuracy:.4f} ({self.spans:,} spans)"
        )


@torch.inference_mode()
def evaluate_denoising(model: TrainedModel, tokens: np.ndarray, batch_size: int, max_tokens: int = 0) -> DenoisingEvaluation:
    """Loss of every target token made from `tokens` [n], and the share of spans that are exactly right."""
    total, count, exact, spans = 0.0, 0, 0, 0
    for batch in objective_batches(model, tokens, batch_size, max_tokens):
        logits, labels, mask = model.stack(model.definition.split(batch)[0]), batch["labels"], batch["loss_mask"]
        total += float((token_losses(logits, labels) * mask).double().sum())
        count += int(mask.sum())
        best = logits[:, :, :model.tokenizer.vocab_size].argmax(dim=-1).transpose(0, 1)
        right, found = count_exact_spans(best == labels, batch["target_spans"])
        exact, spans = exact + right, spans + found
    return DenoisingEvaluation(total / count, math.exp(min(total / count, 700.0)), count, exact / spans if spans else 0.0, spans)


def count_exact_spans(right: torch.Tensor, span: torch.Tensor) -> tuple[int, int]:
    """(spans without a wrong token, spans): `right` [b, t] bool, `span` [b, t] the number of the span from 1, 0 elsewhere."""
    most = int(span.max()) + 1
    wrong = torch.zeros(len(span), most, device=span.device).scatter_add_(1, span, (~right).float())
    present = torch.zeros_like(wrong).scatter_(1, span, 1.0)[:, 1:] > 0
    return int((present & (wrong[:, 1:] == 0)).sum()), int(present.sum())
