"""The encoder (BERT-like): bidirectional layers and BERT's LM head, as an ordered list of entries.

Shape letters: b micro-batch, s sequence, v padded vocabulary.
"""

from megadsl.model.blueprint import Blueprint
from megadsl.model.stack import LayerEntry


def encoder_entries(blueprint: Blueprint, names: tuple[str, ...] = ()) -> list[LayerEntry]:
    """(tokens [b, s], *context) -> logits [s, b, v], with sentence-order logits [b, 2] beside them where the data has them.

    `names` of the context: segments [b, s], tokentypes [b, s].
    """
    flowing = tuple(name for name in names if name != "tokentypes")
    return [
        blueprint.word_embedding(),
        blueprint.embedding_sum("embedding", blueprint.model.seq_length, names),
        *blueprint.layers("encoder", False, flowing),
        blueprint.stack_end(),
        blueprint.masked_head(blueprint.config.data.sentence_order),
        blueprint.logits(),
        blueprint.output_bias(),
    ]
