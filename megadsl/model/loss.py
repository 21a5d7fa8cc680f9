"""Losses and predictions over a vocabulary that is sliced over tensor-parallel ranks.

Shape letters: s sequence, b micro-batch, v padded vocabulary, p tensor-parallel size.
"""

import torch
import torch.distributed as dist
from megatron.core import tensor_parallel

from megadsl.parallel.groups import tensor_group


def token_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy in nats of every position. logits [s, b, v/p], labels [b, s] -> [b, s]; computed in fp32."""
    losses = tensor_parallel.vocab_parallel_cross_entropy(logits.float(), labels.transpose(0, 1).contiguous())
    return losses.transpose(0, 1)


def token_losses_and_log_normalizers(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`token_losses`, and logsumexp of every position's logits, both [b, s]."""
    losses, normalizers = _LossesAndLogNormalizers.apply(logits.float(), labels.transpose(0, 1).contiguous())
    return losses.transpose(0, 1), normalizers.transpose(0, 1)


def smoothed_token_losses(logits: torch.Tensor, labels: torch.Tensor, smoothing: float, vocab_size: int) -> torch.Tensor:
    """Cross-entropy against (1 - e) label + e / v over the v = `vocab_size` real pieces (arXiv 1512.00567, section 7), both [b, s].

    -sum_i t_i log p_i = (1 - e) cross-entropy + e (Z - mean_i x_i). Not by Megatron's label_smoothing: its mean runs over the slice
    of one tensor-parallel rank and over the padding of the vocabulary.
    """
    losses, normalizers = token_losses_and_log_normalizers(logits, labels)
    real = min(max(vocab_size - tensor_group().rank() * logits.size(-1), 0), logits.size(-1))
    mean = tensor_parallel.reduce_from_tensor_model_parallel_region(logits[..., :real].float().sum(dim=-1)) / vocab_size
    return (1.0 - smoothing) * losses + smoothing * (normalizers - mean.transpose(0, 1))


class _LossesAndLogNormalizers(torch.autograd.Function):
    """Cross-entropy Z - x_label and Z = ln sum_i e^{x_i} together, from one softmax p: Megatron's function keeps Z to itself.

    dZ/dx_i = p_i on the rank that holds i, whatever the other ranks hold.
    """

    @staticmethod
    def forward(ctx, logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        group, size = tensor_group(), logits.size(-1)
        largest = logits.amax(dim=-1)
        if group.size() > 1:
            dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
        softmax = (logits - largest.unsqueeze(-1)).exp_()
        index = labels - group.rank() * size
        elsewhere = (index < 0) | (index >= size)
        index = index.masked_fill(elsewhere, 0).unsqueeze(-1)
        at_label = logits.gather(-1, index).squeeze(-1).masked_fill(elsewhere, 0.0)
        sums = torch.stack((softmax.sum(dim=-1), at_label))
        if group.size() > 1:
            dist.all_reduce(sums, group=group)
        normalizers = sums[0].log() + largest
        ctx.save_for_backward(softmax.div_(sums[0].unsqueeze(-1)), index, elsewhere)
        return normalizers - sums[1], normalizers

    @staticmethod
    def backward(ctx, loss_gradient: torch.Tensor, normalizer_gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        softmax, index, elsewhere = ctx.saved_tensors
        gradient = softmax * (loss_gradient + normalizer_gradient).unsqueeze(-1)
        return gradient.scatter_add_(-1, index, -loss_gradient.masked_fill(elsewhere, 0.0).unsqueeze(-1)), None


def whole_logits(logits: torch.Tensor) -> torch.Tensor:
    """Logits [..., v/p] of all tensor-parallel ranks side by side, [..., v]."""
    return tensor_parallel.gather_from_tensor_model_parallel_region(logits)


@torch.no_grad()
def likeliest_tokens(logits: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """The likeliest real token of every position (the padding of the vocabulary is none). logits [s, b, v/p] -> [b, s]."""
    group, size = tensor_group(), logits.size(-1)
    first = group.rank() * size
    best = logits[..., :max(0, vocab_size - first)].max(dim=-1) if vocab_size > first else None
    value = logits.new_full(logits.shape[:2], -torch.inf) if best is None else best.values
    token = torch.zeros_like(value, dtype=torch.long) if best is None else best.indices + first
    if group.size() > 1:
        values, tokens = ([torch.empty_like(one) for _ in range(group.size())] for one in (value, token))
        dist.all_gather(values, value.contiguous(), group=group)
        dist.all_gather(tokens, token.contiguous(), group=group)
        token = torch.stack(tokens).gather(0, torch.stack(values).argmax(dim=0, keepdim=True))[0]
    return token.transpose(0, 1)
