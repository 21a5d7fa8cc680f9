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
