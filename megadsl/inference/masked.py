"""Masked-token accuracy and pseudo-perplexity of an encoder.

Pseudo-perplexity (Salazar et al., arXiv 1910.14659, section 2.3): every token in turn is masked alone and predicted from all
others, exp of the mean negative log-probability. It costs one forward pass per token, so it is taken over fewer tokens.
Shape letters: b batch, s sequence, v vocabulary.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch

from megadsl.inference.batches import objective_batches
from megadsl.inference.load import TrainedModel
from megadsl.model.loss import token_losses
from megadsl.model.stream import hidden_of

Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class MaskedEvaluation:
    """What `megadsl evaluate` prints of an encoder. masked_loss is in nats per masked token."""

    masked_accuracy: float
    masked_loss: float
    masked_tokens: int
    pseudo_perplexity: float | None
    pseudo_perplexity_tokens: int
    sentence_order_accuracy: float | None

    def text(self) -> str:
        order = "" if self.sentence_order_accuracy is None else f" | sentence-order accuracy {self.sentence_order_accuracy:.4f}"
        pseudo = "" if self.pseudo_perplexity is None else (
            f" | pseudo-perplexity {self.pseudo_perplexity:.3f} ({self.pseudo_perplexity_tokens:,} tokens)"
        )
        return (
            f"masked-token accuracy {self.masked_accuracy:.4f} | masked loss {self.masked_loss:.4f} nats per token "
            f"({self.masked_tokens:,} tokens){pseudo}{order}"
        )


@torch.inference_mode()
def evaluate_masked(model: TrainedModel, tokens: np.ndarray, batch_size: int, max_tokens: int = 0,
                    pseudo_tokens: int = 512) -> MaskedEvaluation:
    """Masked-token accuracy and loss over `tokens` [t], and pseudo-perplexity over the first `pseudo_tokens` (0: none)."""
    right, loss, masked, ordered, sequences = 0, 0.0, 0, 0, 0
    pseudo_loss, pseudo_done = 0.0, 0
    for batch in objective_batches(model, tokens, batch_size, max_tokens):
        output = model.stack(model.definition.split(batch)[0])
        logits, mask = hidden_of(output), batch["loss_mask"]
        loss += float((token_losses(logits, batch["labels"]) * mask).double().sum())
        right += int(((_best(model, logits) == batch["labels"]) * mask).sum())
        masked += int(mask.sum())
        if "sentence_order" in model.definition.targets:
            ordered += int((output[1].argmax(dim=-1) == batch["sentence_order"]).sum())
            sequences += len(mask)
        if pseudo_done < pseudo_tokens:
            more, count = _pseudo_losses(model, batch, batch_size, pseudo_tokens - pseudo_done)
            pseudo_loss, pseudo_done = pseudo_loss + more, pseudo_done + count
    return MaskedEvaluation(
        right / masked, loss / masked, masked, math.exp(min(pseudo_loss / pseudo_done, 700.0)) if pseudo_done else None,
        pseudo_done, ordered / sequences if sequences else None,
    )


def _best(model: TrainedModel, logits: torch.Tensor) -> torch.Tensor:
    """logits [s, b, v] -> likeliest real tokens [b, s] (the padding of the vocabulary is none)."""
    return logits[:, :, :model.tokenizer.vocab_size].argmax(dim=-1).transpose(0, 1)


def _pseudo_losses(model: TrainedModel, batch: Batch, batch_size: int, most: int) -> tuple[float, int]:
    """(sum of the losses of text tokens that are masked one at a time, how many) over the first `most` of a batch."""
    is_text = torch.from_numpy(np.asarray(model.tokenizer.is_text)).to(model.device)
    places = is_text[batch["labels"]].nonzero()[:most]  # [count, 2]: row, position
    total = 0.0
    for part in places.split(batch_size):
        rows, positions = part.unbind(dim=1)
        copies = {name: tensor[rows] for name, tensor in batch.items()}
        copies["tokens"] = copies["labels"].clone()
        each = torch.arange(len(rows), device=rows.device)
        copies["tokens"][each, positions] = model.tokenizer.mask
        losses = token_losses(hidden_of(model.stack(model.definition.split(copies)[0])), copies["labels"])
        total += float(losses[each, positions].double().sum())
    return total, len(places)
