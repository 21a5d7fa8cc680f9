"""Layers of vector_task.py: what needs torch."""

import torch
from megatron.core.transformer import TransformerConfig

from megadsl.model.activations import Activations
from megadsl.model.init import ParameterTag, tag


class VectorProjection(torch.nn.Module):
    """vectors [b, s, d] -> hidden [s, b, h]."""

    def __init__(self, config: TransformerConfig, size: int, std: float):
        super().__init__()
        self.linear = torch.nn.Linear(size, config.hidden_size, bias=False, dtype=config.params_dtype)
        tag(self.linear.weight, ParameterTag("input_projection", (config.hidden_size, size), {"input_projection": std}))

    def forward(self, value: Activations) -> Activations:
        hidden = self.linear(value["vectors"].to(self.linear.weight.dtype)).transpose(0, 1).contiguous()
        return value.without("vectors").replace(hidden=hidden)


class MeanClassifier(torch.nn.Module):
    """Logits [b, c] of the mean over the positions that are not padding."""

    def __init__(self, config: TransformerConfig, classes: int, std: float):
        super().__init__()
        self.linear = torch.nn.Linear(config.hidden_size, classes, dtype=config.params_dtype)
        tag(self.linear.weight, ParameterTag("output_head", (classes, config.hidden_size), {"output_head": std}))
        tag(self.linear.bias, ParameterTag("bias", (classes,), {}))

    def forward(self, value: Activations) -> Activations:
        weight = (value["segments"] > 0).to(value.hidden.dtype).transpose(0, 1).unsqueeze(-1)
        mean = (value.hidden * weight).sum(dim=0) / weight.sum(dim=0)
        return value.without("hidden").replace(logits=self.linear(mean))
