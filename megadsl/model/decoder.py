"""The decoder (GPT-like): word and position embedding, causal layers, final norm, LM head, as an ordered list of entries.

Shape letters: b micro-batch, s sequence, v padded vocabulary.
"""

from megadsl.model.blueprint import Blueprint
from megadsl.model.stack import LayerEntry


def decoder_entries(blueprint: Blueprint, names: tuple[str, ...] = ()) -> list[LayerEntry]:
    """(tokens [b, s], *context) -> logits [s, b, v]; `names` of the context: segments [b, s], prefix_length [b]."""
    return [
        blueprint.word_embedding(),
        blueprint.embedding_sum("embedding", blueprint.model.seq_length, names),
        *blueprint.layers("decoder", True, names),
        blueprint.stack_end(),
        blueprint.logits(),
    ]
