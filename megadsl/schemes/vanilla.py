"""`vanilla`: Megatron-LM's default. Every matrix and table has std 0.02, the last matrix of a branch 0.02 / sqrt(2N), N layers of
its stack.

lambda = beta = 1, the tied head is not rescaled.
"""

import math

from megadsl.config.model import ModelConfig, SchemeConfig
from megadsl.schemes.assemble import Draft, additions, embedding_tables, head_plan
from megadsl.theory.shape import Sublayer

STD = 0.02


def draft(model: ModelConfig, scheme: SchemeConfig, vocab_size: int) -> Draft:
    """The numbers of Megatron's default initialisation."""
    def sublayer(stack: str, layer: int, kind: str) -> Sublayer:
        layers = model.decoder_layers if stack == "decoder" and model.family == "encoder_decoder" else model.num_layers
        last = STD / math.sqrt(2.0 * layers)
        if kind == "ffn":
            return Sublayer(stack, layer, kind, 1.0, 1.0, {"fc1": STD, "fc2": last})
        return Sublayer(stack, layer, kind, 1.0, 1.0, {"query": STD, "key": STD, "value": STD, "attention_output": last})

    sublayers = [sublayer(*addition) for addition in additions(model)]
    return Draft("vanilla", embedding_tables(model, STD), sublayers, head_plan(model, 1.0, STD, STD))
