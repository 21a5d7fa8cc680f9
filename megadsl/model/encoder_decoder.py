"""The encoder-decoder (T5- and BART-like) as one ordered list: encoder, bridge, decoder, LM head.

Target tokens flow beside the encoder's hidden state until the bridge embeds them with the shared word table; from there on
the encoder's output flows beside the decoder's hidden state as its memory.
Shape letters: b micro-batch, s source and t target length, v padded vocabulary.
"""

import torch

from megadsl.model.blueprint import Blueprint
from megadsl.model.stack import LayerEntry


def encoder_decoder_entries(blueprint: Blueprint, names: tuple[str, ...] = ()) -> list[LayerEntry]:
    """(source_tokens [b, s], target_tokens [b, t], *rest) -> logits [t, b, v]; `names` = ("target_tokens", *rest), where rest
    may hold source_segments [b, s] (0: padding)."""
    relative = ("position_bias",) if blueprint.model.position_embedding_type == "relative" else ()
    memory = ("memory", *names[1:])
    return [
        blueprint.word_embedding(shared=True),
        blueprint.embedding_sum("encoder.embedding", blueprint.model.seq_length, names),
        *blueprint.layers("encoder", False, names),
        blueprint.stack_end("encoder.final_norm", keep_context=True),
        LayerEntry("bridge", None, tied_key="word_embedding", tied_forward=Bridge(len(relative))),
        blueprint.embedding_sum("decoder.embedding", blueprint.model.target_length, memory),
        *blueprint.layers("decoder", True, memory),
        blueprint.stack_end("final_norm"),
        blueprint.logits(),
    ]


class Bridge:
    """(memory, target tokens, *rest[, position bias]) -> (hidden of the target words, memory, *rest); holds no parameter."""

    def __init__(self, dropped: int):
        self.dropped = dropped

    def __call__(self, embedding: torch.nn.Module, value: tuple) -> tuple:
        memory, tokens, *rest = value
        return (embedding(tokens), memory, *rest[:len(rest) - self.dropped])
