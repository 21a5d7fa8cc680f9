"""Embeddings: the word table (held alone, so that it can be tied across pipeline stages), what is added to it, and T5's
relative position bias.

Shape letters: b micro-batch, s sequence, h hidden, v padded vocabulary, n heads, p tensor-parallel size.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.models.common.embeddings.relative_pos_embedding import RelativePositionEmbedding
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.torch_norm import WrappedTorchNorm

from megadsl.config.model import ModelConfig
from megadsl.model.activations import Activations
from megadsl.model.init import ParameterTag, tag, tag_norm
from megadsl.model.masks import positions_in_segments
from megadsl.schemes.plan import EmbeddingPlan


class WordEmbedding(torch.nn.Module):
    """tokens [b, s] -> hidden [s, b, h]; the table [v, h] is sliced along v.

    Args:
        source: name of the tokens, which end here.
    """

    def __init__(self, config: TransformerConfig, padded_vocab_size: int, std: float, source: str = "tokens"):
        super().__init__()
        self.source = source
        self.table = tensor_parallel.VocabParallelEmbedding(
            padded_vocab_size, config.hidden_size, init_method=config.init_method, config=config
        )
        shape = (padded_vocab_size, config.hidden_size)
        tag(self.table.weight, ParameterTag("word_embedding", shape, {"word_embedding": std}, partition_dim=0))

    @property
    def weight(self) -> torch.nn.Parameter:
        return self.table.weight

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """tokens [b, s] -> [s, b, h]."""
        return self.table(tokens).transpose(0, 1).contiguous()

    def forward(self, value: Activations) -> Activations:
        return value.without(self.source).replace(hidden=self.embed(value[self.source]))


class TargetWords:
    """The decoder's hidden state from its target tokens [b, t] and the encoder's word table, with the encoder's hidden state as
    "memory" beside it; holds no parameter."""

    def __call__(self, embedding: WordEmbedding, value: Activations) -> Activations:
        tokens, memory = value["target_tokens"], value.hidden
        return value.without("target_tokens").replace(hidden=embedding.embed(tokens), memory=memory)


class TargetEmbedding(WordEmbedding):
    """The same for a decoder with a word table of its own, where the encoder reads no words or those of another vocabulary."""

    def __init__(self, config: TransformerConfig, padded_vocab_size: int, std: float):
        super().__init__(config, padded_vocab_size, std, "target_tokens")

    def forward(self, value: Activations) -> Activations:
        return TargetWords()(self, value)


class EmbeddingSum(torch.nn.Module):
    """Adds positions and token types to the words' hidden state, normalises the sum where the model does, and drops out.

    Token types end here.

    Args:
        max_positions: rows of a learned or sinusoidal position table.
        reset_positions: positions start at 0 in every segment.
        waves: [positions, h], root mean square 1: what sinusoidal positions are, where not those of a sequence (a plane's).
    """

    def __init__(self, config: TransformerConfig, model: ModelConfig, plan: EmbeddingPlan, max_positions: int,
                 reset_positions: bool = False, waves: np.ndarray | None = None):
        super().__init__()
        self.reset_positions, self.dropout = reset_positions, config.hidden_dropout
        std = plan.weight_std
        self.position = self.tokentype = self.norm = None
        if model.position_embedding_type == "learned_absolute":
            self.position = _table(max_positions, config, "position_embedding", std["position_embedding"])
        elif model.position_embedding_type == "sinusoidal":
            del self.position
            waves = sinusoid(max_positions, config.hidden_size) if waves is None else torch.from_numpy(waves).float()
            self.register_buffer("position", (waves * std["position_embedding"]).to(config.params_dtype), persistent=False)
        if model.num_tokentypes:
            self.tokentype = _table(model.num_tokentypes, config, "tokentype_embedding", std["tokentype_embedding"])
        if plan.norm_gain is not None:
            self.norm = WrappedTorchNorm(config, config.hidden_size, config.layernorm_epsilon)
            tag_norm(self.norm, plan.norm_gain)

    def forward(self, value: Activations, offset: int = 0) -> Activations:
        """`offset` is the position of hidden[0] (not 0 while generating from a key/value cache)."""
        hidden = value.hidden
        if self.position is not None:
            hidden = hidden + self._positions(hidden.size(0), offset, value)
        tokentypes = value.get("tokentypes")
        if self.tokentype is not None:
            rows = self.tokentype[:1] if tokentypes is None else self.tokentype[tokentypes].transpose(0, 1)
            hidden = hidden + rows
        if self.norm is not None:
            hidden = self.norm(hidden)
        return value.without("tokentypes").replace(hidden=F.dropout(hidden, p=self.dropout, training=self.training))

    def _positions(self, length: int, offset: int, value: Activations) -> torch.Tensor:
        if self.reset_positions and "segments" in value:
            return self.position[positions_in_segments(value["segments"])].transpose(0, 1)
        return self.position[offset:offset + length].unsqueeze(1)


class RelativePositions(RelativePositionEmbedding):
    """Adds T5's bias on attention scores, [1, n/p, s, s], to the context; one table [buckets, n] serves a whole stack.

    It starts at 0, so that it does not change the signal at initialisation (arXiv 1910.10683, section 2.1).
    """

    def __init__(self, model: ModelConfig, tensor_parallel_size: int, causal: bool):
        buckets, heads = model.relative_attention_num_buckets, model.num_attention_heads
        super().__init__(not causal, lambda weight: None, heads // tensor_parallel_size, buckets,
                         model.relative_attention_max_distance)
        tag(self.relative_attention_bias.weight,
            ParameterTag("relative_attention_bias", (buckets, heads), {}, partition_dim=1))

    def forward(self, value: Activations, offset: int = 0) -> Activations:
        """`offset` tokens before hidden[0] are cached; the bias is then [1, n/p, s, offset + s]."""
        length = offset + value.hidden.size(0)
        return value.replace(position_bias=super().forward(length, length)[:, :, offset:].contiguous())


def sinusoid(positions: int, hidden_size: int) -> torch.Tensor:
    """sqrt(2) (sin, cos) of position * 10000^(-2i/h), sines first: root mean square 1; [positions, h] in fp32."""
    frequencies = torch.exp(torch.arange(0, hidden_size, 2) * (-math.log(10000.0) / hidden_size))
    angle = torch.arange(positions)[:, None] * frequencies
    return math.sqrt(2.0) * torch.cat([angle.sin(), angle.cos()], dim=1)[:, :hidden_size]


def _table(rows: int, config: TransformerConfig, role: str, std: float) -> torch.nn.Parameter:
    table = torch.nn.Parameter(torch.empty(rows, config.hidden_size, dtype=config.params_dtype))
    tag(table, ParameterTag(role, tuple(table.shape), {role: std}))
    return table
