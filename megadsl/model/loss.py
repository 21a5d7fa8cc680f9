"""Losses over a vocabulary that is sliced over tensor-parallel ranks.

Shape letters: s sequence, b micro-batch, v padded vocabulary, p tensor-parallel size.
"""

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel


def token_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy in nats of every position. logits [s, b, v/p], labels [b, s] -> [b, s]; computed in fp32."""
    losses = tensor_parallel.vocab_parallel_cross_entropy(logits.float(), labels.transpose(0, 1).contiguous())
    return losses.transpose(0, 1)


def language_model_loss(logits: torch.Tensor, targets: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Mean loss of a micro-batch over the positions that count; targets = (labels [b, s], loss_mask [b, s])."""
    labels, loss_mask = targets
    return (token_losses(logits, labels) * loss_mask).sum() / loss_mask.sum().clamp(min=1)


def masked_and_order_loss(output: tuple[torch.Tensor, torch.Tensor], targets: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Masked-token loss plus the loss of the sentence order, as BERT adds them; output = (logits, order logits [b, 2])."""
    logits, order_logits = output
    *words, order = targets
    return language_model_loss(logits, words) + F.cross_entropy(order_logits.float(), order)
