"""`vanilla`: the default initialisation of Megatron-LM (arXiv 1909.08053), which is GPT-2's.

x + f(N(x)) or N(x + f(x)), every std .02, the last matrix of a branch .02 / sqrt(2 L)

L layers of the stack. lambda = beta = 1; the tied head is not rescaled.
"""

import math

from megadsl.config.model import ModelConfig, SchemeConfig
from megadsl.schemes.assemble import Parametrization, additions, embedding_tables, equal_stds, head_plan, stack_layers
from megadsl.theory.shape import Sublayer

STD = 0.02


def parametrize(model: ModelConfig, scheme: SchemeConfig, vocab_size: int) -> Parametrization:
    """The numbers of Megatron's default initialisation."""
    def sublayer(stack: str, layer: int, kind: str) -> Sublayer:
        last = "fc2" if kind == "ffn" else "attention_output"
        stds = {**equal_stds(kind, STD), last: STD / math.sqrt(2.0 * stack_layers(model, stack))}
        return Sublayer(stack, layer, kind, 1.0, 1.0, stds)

    sublayers = [sublayer(*addition) for addition in additions(model)]
    return Parametrization("vanilla", embedding_tables(model, STD), sublayers, head_plan(model, 1.0, STD, STD))
