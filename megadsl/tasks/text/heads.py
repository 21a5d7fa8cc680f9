"""The heads: a vector of a sequence to logits of classes, every token to scores of a span's start and end.

Replicated over tensor-parallel ranks. Shape letters: s sequence, b micro-batch, h hidden, c outputs.
"""

from typing import Literal

import torch
import torch.nn.functional as F

from megadsl.model.activations import Activations
from megadsl.model.builder import ModelBuilder
from megadsl.model.head import linear

Pooling = Literal["first", "last", "mean"]


class PooledHead(torch.nn.Module):
    """logits [b, c] of one vector of every sequence.

    Args:
        pooler: BERT's tanh of a dense in front of the output matrix.
    """

    def __init__(self, builder: ModelBuilder, outputs: int, pooling: Pooling, pooler: bool):
        super().__init__()
        size, std = builder.model.hidden_size, builder.plan.head.weight_std["output_head"]
        self.pooling, self.dropout = pooling, builder.model.hidden_dropout
        self.pooler = linear(size, size, "head_dense", size ** -0.5, builder.core) if pooler else None
        self.linear = linear(size, outputs, "output_head", std, builder.core)

    def forward(self, value: Activations) -> Activations:
        pooled = self._pooled(value.hidden, value["segments"])
        if self.pooler is not None:
            pooled = torch.tanh(self.pooler(pooled))
        pooled = F.dropout(pooled, p=self.dropout, training=self.training)
        return value.without("hidden").replace(logits=self.linear(pooled))

    def _pooled(self, hidden: torch.Tensor, segments: torch.Tensor) -> torch.Tensor:
        """[s, b, h], [b, s] -> [b, h]."""
        if self.pooling == "first":
            return hidden[0]
        real = segments > 0
        if self.pooling == "last":
            return hidden[real.sum(dim=1) - 1, torch.arange(len(real), device=real.device)]
        weight = real.to(hidden.dtype).transpose(0, 1).unsqueeze(-1)
        return (hidden * weight).sum(dim=0) / weight.sum(dim=0)


class SpanHead(torch.nn.Module):
    """logits [b, s, 2]: scores of every token as a span's start and as its end; of padding -inf."""

    def __init__(self, builder: ModelBuilder):
        super().__init__()
        self.linear = linear(builder.model.hidden_size, 2, "output_head", builder.plan.head.weight_std["output_head"], builder.core)

    def forward(self, value: Activations) -> Activations:
        logits = self.linear(value.hidden).transpose(0, 1)
        return value.without("hidden").replace(logits=logits.masked_fill((value["segments"] == 0).unsqueeze(-1), -torch.inf))
