"""The encoder (BERT-like) as an ordered list of entries: a task's input layers, bidirectional layers, final norm, the task's head."""

from megadsl.model.builder import ModelBuilder, TaskLayers
from megadsl.model.stack import LayerEntry


def encoder_entries(builder: ModelBuilder, layers: TaskLayers) -> list[LayerEntry]:
    """Context that the layers know: segments [b, s] (0: padding)."""
    return [
        *layers.inputs,
        *builder.layers("encoder", False, layers.context, layers.isolated),
        builder.stack_end(keep=layers.context),
        *layers.head,
    ]
