"""The encoder (BERT-like): bidirectional layers and BERT's LM head, as an ordered list of entries.

Shape letters: b micro-batch, s sequence, v padded vocabulary.
"""

from megadsl.model.builder import ModelBuilder
from megadsl.model.stack import LayerEntry


def encoder_entries(builder: ModelBuilder, names: tuple[str, ...] = ()) -> list[LayerEntry]:
    """(tokens [b, s], *context) -> logits [s, b, v], with sentence-order logits [b, 2] beside them where the data has them.

    `names` of the context: segments [b, s], tokentypes [b, s].
    """
    flowing = tuple(name for name in names if name != "tokentypes")
    return [
        builder.word_embedding(),
        builder.embedding_sum("embedding", builder.model.seq_length, names),
        *builder.layers("encoder", False, flowing),
        builder.stack_end(),
        builder.masked_head(builder.config.data.sentence_order),
        builder.logits(),
        builder.output_bias(),
    ]
