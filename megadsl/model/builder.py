"""What the three families share when they write down their list of layers: the entries of embedding, layers and head.

Shape letters: s sequence, b micro-batch, h hidden, v padded vocabulary.
"""

from functools import partial

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.torch_norm import WrappedTorchNorm

from megadsl.config import Config
from megadsl.model.embedding import EmbeddingSum, RelativePositions, WordEmbedding
from megadsl.model.head import MaskedHead, OutputBias, OutputHead, TiedHead
from megadsl.model.init import tag_norm
from megadsl.model.layer import ACTIVATIONS, Layer, transformer_config
from megadsl.model.masks import Remembered, attention_mask
from megadsl.model.stack import LayerEntry
from megadsl.model.stream import Context, hidden_of, with_hidden
from megadsl.schemes.plan import SignalPlan


class ModelBuilder:
    """Makes the entries of one model from its configuration and plan; builds nothing itself."""

    def __init__(self, config: Config, plan: SignalPlan, padded_vocab_size: int):
        self.config, self.model, self.plan, self.padded_vocab_size = config, config.model, plan, padded_vocab_size
        self.tensor_parallel_size = config.parallel.tensor_model_parallel_size
        self.core = transformer_config(self.model, self.tensor_parallel_size, config.training.precision)
        self.tied = not self.model.untie_embeddings_and_output_weights

    def word_embedding(self, shared: bool = False) -> LayerEntry:
        """The word table; `shared`: entries further down use it again."""
        std = self.plan.embedding.weight_std["word_embedding"]
        return LayerEntry("embedding.word", partial(WordEmbedding, self.core, self.padded_vocab_size, std),
                          tied_key="word_embedding" if shared or self.tied else None)

    def embedding_sum(self, name: str, max_positions: int, names: tuple[str, ...] = ()) -> LayerEntry:
        """Positions, token types, norm and dropout; uses "tokentypes" of the context up."""
        return LayerEntry(name, partial(EmbeddingSum, self.core, self.model, self.plan.embedding, max_positions, names,
                                        self.config.data.reset_position_ids))

    def layers(self, stack: str, causal: bool, names: tuple[str, ...] = ()) -> list[LayerEntry]:
        """The layers of one stack, behind its relative positions where the model has them."""
        entries = []
        if self.model.position_embedding_type == "relative":
            entries.append(LayerEntry(f"{stack}.relative_position", partial(
                RelativePositions, self.model, self.tensor_parallel_size, causal, names)))
            names = ("position_bias", *names)
        masks = Masks(causal, self.config.data.reset_attention_mask)
        rotary = self._rotary() if self.model.position_embedding_type == "rope" else None
        entries += [
            LayerEntry(f"{stack}.{index}", partial(
                Layer, self.model, self.core, index, self.plan.layer(stack, index), self.plan.norm_position, causal, names, masks,
                rotary, self.config.training.recompute), is_layer=True)
            for index in range(self.plan.num_layers(stack))
        ]
        return entries

    def stack_end(self, name: str = "final_norm", keep_context: bool = False) -> LayerEntry:
        """The norm at the end of a stack (Post-LN has normalised already), and the end of its context."""
        return LayerEntry(name, partial(StackEnd, self.core, self.plan.norm_position == "pre", keep_context))

    def masked_head(self, sentence_order: bool) -> LayerEntry:
        """BERT's transform in front of the logits."""
        activation = ACTIVATIONS[self.model.activation]
        return LayerEntry("lm_head", partial(MaskedHead, self.core, activation, self.plan.head.weight_std["head_dense"],
                                             sentence_order))

    def logits(self) -> LayerEntry:
        """The matrix from hidden state to logits: the word table, or one of its own."""
        head = self.plan.head
        if self.tied:
            return LayerEntry("tied_head", None, tied_key="word_embedding", tied_forward=TiedHead(head.hidden_scale))
        return LayerEntry("output_head", partial(
            OutputHead, self.core, self.padded_vocab_size, head.weight_std["output_head"], head.hidden_scale))

    def output_bias(self) -> LayerEntry:
        return LayerEntry("output_bias", partial(OutputBias, self.core, self.padded_vocab_size, self.tensor_parallel_size))

    def _rotary(self) -> RotaryEmbedding:
        # One for all layers of a stack: it remembers the angles of a length.
        return RotaryEmbedding(self.model.head_dim, rotary_percent=1.0, rotary_base=self.model.rotary_base,
                               use_cpu_initialization=True)


class Masks:
    """(hidden, context) -> the masks of self- and cross-attention of a stack's layers.

    Args:
        causal: a decoder's stack.
        isolated: documents packed into one sequence do not see each other. (Padding is never seen.)
    """

    def __init__(self, causal: bool, isolated: bool):
        self.causal, self.isolated = causal, isolated
        self._own, self._memory = Remembered(attention_mask), Remembered(attention_mask)

    def __call__(self, hidden: torch.Tensor, context: Context) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        length, device, biased = hidden.size(0), hidden.device, "position_bias" in context
        segments = context.get("segments") if self.isolated else None
        source = context.get("source_segments")
        if "memory" in context:
            memory = self._memory(False, length, device, source)
        else:
            memory, segments = None, segments if source is None else source
        own = self._own(self.causal, length, device, segments, segments, context.get("prefix_length"), biased)
        return own, memory


class StackEnd(torch.nn.Module):
    """stream -> normed hidden state (Pre-LN), with the context only where it is still needed."""

    def __init__(self, config: TransformerConfig, normalised: bool, keep_context: bool):
        super().__init__()
        self.keep_context = keep_context
        self.layer = torch.nn.Identity()
        if normalised:
            self.layer = WrappedTorchNorm(config, config.hidden_size, config.layernorm_epsilon)
            tag_norm(self.layer)

    def forward(self, value):
        hidden = self.layer(hidden_of(value))
        return with_hidden(value, hidden) if self.keep_context else hidden
