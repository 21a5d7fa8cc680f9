"""The encoder-decoder (T5- and BART-like) as one ordered list: encoder, bridge, decoder, LM head.

Target tokens flow beside the encoder's hidden state until the bridge embeds them with the shared word table; from there on
the encoder's output flows beside the decoder's hidden state as its memory.
Shape letters: b micro-batch, s source and t target length, v padded vocabulary.
"""

import torch

from megadsl.model.builder import ModelBuilder
from megadsl.model.stack import LayerEntry


def encoder_decoder_entries(builder: ModelBuilder, names: tuple[str, ...] = ()) -> list[LayerEntry]:
    """(source_tokens [b, s], target_tokens [b, t], *rest) -> logits [t, b, v]; `names` = ("target_tokens", *rest), where rest
    may hold source_segments [b, s] (0: padding)."""
    memory = ("memory", *names[1:])
    return [
        builder.word_embedding(shared=True),
        builder.embedding_sum("encoder.embedding", builder.model.seq_length, names),
        *builder.layers("encoder", False, names),
        builder.stack_end("encoder.final_norm", keep_context=True),
        LayerEntry("bridge", None, tied_key="word_embedding", tied_forward=Bridge(builder.model.position_embedding_type == "relative")),
        builder.embedding_sum("decoder.embedding", builder.model.target_length, memory),
        *builder.layers("decoder", True, memory),
        builder.stack_end("final_norm"),
        builder.logits(),
    ]


class Bridge:
    """(memory[, position bias], target tokens, *rest) -> (hidden of the target words, memory, *rest); holds no parameter.

    The bias is the encoder's; the decoder has its own.
    """

    def __init__(self, biased: bool):
        self.biased = biased

    def __call__(self, embedding: torch.nn.Module, value: tuple) -> tuple:
        tokens, *rest = value[2:] if self.biased else value[1:]
        return (embedding(tokens), value[0], *rest)
