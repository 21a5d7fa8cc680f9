"""The decoder (GPT-like) as an ordered list of entries: a task's input layers, causal layers, final norm, the task's head."""

from megadsl.model.builder import ModelBuilder, TaskLayers
from megadsl.model.stack import LayerEntry


def decoder_entries(builder: ModelBuilder, layers: TaskLayers) -> list[LayerEntry]:
    """Context that the layers know: segments [b, s], prefix_length [b]."""
    return [
        *layers.inputs,
        *builder.layers("decoder", True, layers.context, layers.isolated),
        builder.stack_end(keep=layers.context),
        *layers.head,
    ]
