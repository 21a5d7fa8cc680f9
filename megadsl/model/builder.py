"""Entries of a model's list, made from its configuration and plan: what trunks and tasks put together.

Shape letters: s sequence, b micro-batch, h hidden, v padded vocabulary.
"""

from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.torch_norm import WrappedTorchNorm

from megadsl.config import Config
from megadsl.config.model import ModelConfig
from megadsl.model.activations import Activations
from megadsl.model.embedding import EmbeddingSum, RelativePositions, TargetEmbedding, TargetWords, WordEmbedding
from megadsl.model.head import MaskedHead, OutputBias, OutputHead, TiedHead
from megadsl.model.init import tag_norm
from megadsl.model.layer import ACTIVATIONS, Layer, transformer_config
from megadsl.model.masks import Masks
from megadsl.model.stack import LayerEntry
from megadsl.schemes.plan import SignalPlan


TARGET_WORDS = "target_words"  # where a decoder that writes token by token starts anew


@dataclass(frozen=True)
class TaskLayers:
    """What a task puts around the trunk.

    Attributes:
        inputs: entries that make the hidden state from the batch's tensors.
        head: entries from the normed hidden state to what the loss reads.
        context: names of the batch's tensors that flow beside the hidden state through all layers and reach the head: segments
            (documents from 1 on, 0: padding), prefix_length, source_segments.
        target_inputs: of an encoder_decoder: entries that make the decoder's hidden state.
        target_context: names of the batch's tensors that wait for those entries.
        isolated: a position attends to its own segment only, so to no padding and to no other document of its sequence.
    """

    inputs: list[LayerEntry]
    head: list[LayerEntry]
    context: tuple[str, ...] = ()
    target_inputs: list[LayerEntry] = field(default_factory=list)
    target_context: tuple[str, ...] = ()
    isolated: bool = False


class ModelBuilder:
    """Makes the entries of one model from its configuration and plan; builds nothing itself."""

    def __init__(self, config: Config, model: ModelConfig, plan: SignalPlan, padded_vocab_size: int):
        self.config, self.model, self.plan, self.padded_vocab_size = config, model, plan, padded_vocab_size
        self.tensor_parallel_size = config.parallel.tensor_model_parallel_size
        self.core = transformer_config(self.model, self.tensor_parallel_size, config.training.precision)
        self.tied = not self.model.untie_embeddings_and_output_weights

    def word_embedding(self, source: str = "tokens", shared: bool = False) -> LayerEntry:
        """The word table over the batch's tensor `source`; `shared`: entries further down use it again."""
        std = self.plan.embedding.weight_std["word_embedding"]
        return LayerEntry("embedding.word", partial(WordEmbedding, self.core, self.padded_vocab_size, std, source),
                          tied_key="word_embedding" if shared or self.tied else None)

    def target_words(self) -> LayerEntry:
        """The decoder's hidden state from "target_tokens" and the shared word table."""
        return LayerEntry(TARGET_WORDS, None, tied_key="word_embedding", tied_forward=TargetWords())

    def target_embedding(self) -> LayerEntry:
        """The decoder's hidden state from "target_tokens" and a word table of the decoder's own, which a tied head shares."""
        std = self.plan.embedding.weight_std["word_embedding"]
        return LayerEntry(TARGET_WORDS, partial(TargetEmbedding, self.core, self.padded_vocab_size, std),
                          tied_key="word_embedding" if self.tied else None)

    def embedding_sum(self, name: str, max_positions: int, reset_positions: bool = False, waves: np.ndarray | None = None) -> LayerEntry:
        """Positions, token types, norm and dropout; uses "tokentypes" up, and "segments" where positions start anew in each. `waves`
        [positions, h]: sinusoidal positions other than a sequence's."""
        return LayerEntry(name, partial(EmbeddingSum, self.core, self.model, self.plan.embedding, max_positions, reset_positions, waves))

    def layers(self, stack: str, causal: bool, context: tuple[str, ...] = (), isolated: bool = False) -> list[LayerEntry]:
        """The layers of one stack, behind its relative positions where the model has them.

        Args:
            context: names of what flows beside the hidden state.
            isolated: see Masks.
        """
        entries, takes = [], ("hidden", *context)
        if self.model.position_embedding_type == "relative":
            entries.append(LayerEntry(f"{stack}.relative_position", partial(
                RelativePositions, self.model, self.tensor_parallel_size, causal)))
            takes = (*takes, "position_bias")
        masks = Masks(self.model, causal, isolated)
        rotary = self._rotary() if self.model.position_embedding_type == "rope" else None
        entries += [
            LayerEntry(f"{stack}.{index}", partial(
                Layer, self.model, self.core, index, self.plan.layer(stack, index), self.plan.norm_position, causal, masks, rotary,
                self.config.training.recompute), takes=takes)
            for index in range(self.plan.num_layers(stack))
        ]
        return entries

    def stack_end(self, name: str = "final_norm", keep: tuple[str, ...] = ()) -> LayerEntry:
        """The norm at the end of a stack (Post-LN has normalised already), and the end of its context, but for `keep`."""
        return LayerEntry(name, partial(StackEnd, self.core, self.plan.norm_position == "pre", keep))

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


class StackEnd(torch.nn.Module):
    """The normed hidden state (Pre-LN), with the context that is still needed."""

    def __init__(self, config: TransformerConfig, normalised: bool, keep: tuple[str, ...]):
        super().__init__()
        self.keep = keep
        self.layer = torch.nn.Identity()
        if normalised:
            self.layer = WrappedTorchNorm(config, config.hidden_size, config.layernorm_epsilon)
            tag_norm(self.layer)

    def forward(self, value: Activations) -> Activations:
        return value.only("hidden", *self.keep).replace(hidden=self.layer(value.hidden))
