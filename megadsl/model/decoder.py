"""The decoder (GPT-like): word and position embedding, causal layers, final norm, LM head, as an ordered list of entries.

Shape letters: b micro-batch, s sequence, v padded vocabulary.
"""

from megadsl.model.builder import ModelBuilder
from megadsl.model.stack import LayerEntry


def decoder_entries(builder: ModelBuilder, names: tuple[str, ...] = ()) -> list[LayerEntry]:
    """(tokens [b, s], *context) -> logits [s, b, v]; `names` of the context: segments [b, s], prefix_length [b]."""
    return [
        builder.word_embedding(),
        builder.embedding_sum("embedding", builder.model.seq_length, names),
        *builder.layers("decoder", True, names),
        builder.stack_end(),
        builder.logits(),
    ]
