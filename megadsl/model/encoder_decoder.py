"""The encoder-decoder (T5- and BART-like) as one ordered list: input layers, encoder, target layers, decoder, head.

What the target layers read waits beside the encoder's hidden state; they make the decoder's hidden state of it, and from there on
the encoder's output flows beside that as "memory".
"""

from megadsl.model.builder import ModelBuilder, TaskLayers
from megadsl.model.stack import LayerEntry


def encoder_decoder_entries(builder: ModelBuilder, layers: TaskLayers) -> list[LayerEntry]:
    """Context that the layers know: source_segments [b, s] (0: padding)."""
    waiting = (*layers.context, *layers.target_context)
    return [
        *layers.inputs,
        *builder.layers("encoder", False, waiting, layers.isolated),
        builder.stack_end("encoder.final_norm", keep=waiting),
        *layers.target_inputs,
        *builder.layers("decoder", True, ("memory", *layers.context), layers.isolated),
        builder.stack_end(keep=layers.context),
        *layers.head,
    ]
