"""The heads: logits from the hidden state with the word table (tied) or a matrix of its own, what BERT puts before and
behind it, and the sentence-order head.

`hidden_scale` comes from the plan: DSLM scales the hidden state so that logits have unit variance whatever the table's
standard deviation is. Shape letters: s sequence, b micro-batch, h hidden, v padded vocabulary, p tensor-parallel size.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.torch_norm import WrappedTorchNorm

from megadsl.model.activations import Activations
from megadsl.model.init import ParameterTag, tag, tag_norm


class TiedHead:
    """Logits [s, b, v/p] from the word embedding's own table; holds no parameter."""

    def __init__(self, hidden_scale: float):
        self.hidden_scale = hidden_scale

    def __call__(self, embedding: torch.nn.Module, value: Activations) -> Activations:
        hidden = tensor_parallel.copy_to_tensor_model_parallel_region(_scaled(value.hidden, self.hidden_scale))
        return value.without("hidden").replace(logits=F.linear(hidden, embedding.weight))


class OutputHead(torch.nn.Module):
    """Logits [s, b, v/p] from a matrix [v, h] that is sliced along v."""

    def __init__(self, config: TransformerConfig, padded_vocab_size: int, std: float, hidden_scale: float):
        super().__init__()
        self.hidden_scale = hidden_scale
        self.linear = tensor_parallel.ColumnParallelLinear(
            config.hidden_size, padded_vocab_size, config=config, init_method=config.init_method, bias=False,
            gather_output=False,
        )
        shape = (padded_vocab_size, config.hidden_size)
        tag(self.linear.weight, ParameterTag("output_head", shape, {"output_head": std}, partition_dim=0))

    def forward(self, value: Activations) -> Activations:
        return value.without("hidden").replace(logits=self.linear(_scaled(value.hidden, self.hidden_scale))[0])


class MaskedHead(torch.nn.Module):
    """BERT's transform in front of the logits: norm(activation(dense h)), replicated over tensor-parallel ranks.

    With `sentence_order` it also gives "order_logits" [b, 2] from the first token (pooler: tanh of a dense).
    """

    def __init__(self, config: TransformerConfig, activation: Callable, std: float, sentence_order: bool):
        super().__init__()
        size = config.hidden_size
        self.activation = activation
        self.dense = linear(size, size, "head_dense", std, config)
        self.norm = WrappedTorchNorm(config, size, config.layernorm_epsilon)
        tag_norm(self.norm)
        self.pooler = self.order = None
        if sentence_order:
            self.pooler = linear(size, size, "head_dense", size ** -0.5, config)
            self.order = linear(size, 2, "head_dense", size ** -0.5, config)

    def forward(self, value: Activations) -> Activations:
        hidden = value.hidden
        transformed = value.replace(hidden=self.norm(self.activation(self.dense(hidden))))
        if self.order is None:
            return transformed
        return transformed.replace(order_logits=self.order(torch.tanh(self.pooler(hidden[0]))))


class OutputBias(torch.nn.Module):
    """Adds a bias [v], sliced like the logits, which the tied table has not."""

    def __init__(self, config: TransformerConfig, padded_vocab_size: int, tensor_parallel_size: int):
        super().__init__()
        self.bias = torch.nn.Parameter(torch.empty(padded_vocab_size // tensor_parallel_size, dtype=config.params_dtype))
        tag(self.bias, ParameterTag("bias", (padded_vocab_size,), {}, partition_dim=0))

    def forward(self, value: Activations) -> Activations:
        return value.replace(logits=value["logits"] + self.bias)


def linear(inputs: int, outputs: int, role: str, std: float, config: TransformerConfig) -> torch.nn.Linear:
    """A matrix [outputs, inputs] with a bias, tagged with its role and replicated over tensor-parallel ranks."""
    made = torch.nn.Linear(inputs, outputs, dtype=config.params_dtype)
    tag(made.weight, ParameterTag(role, (outputs, inputs), {role: std}))
    tag(made.bias, ParameterTag("bias", (outputs,), {}))
    return made


def _scaled(hidden: torch.Tensor, scale: float) -> torch.Tensor:
    return hidden if scale == 1.0 else hidden * scale
