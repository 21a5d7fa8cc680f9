"""`layerscale`: branches that start small, one trained factor a channel (CaiT, arXiv 2103.17239).

x + diag(g) f(N(x)), g = .1 up to 18 layers, 1e-5 up to 24, 1e-6 beyond, every std .02

The paper's words: .1 until depth 18, 1e-5 for depth 24, 1e-6 for deeper networks; what holds between 18 and 24 is read as 1e-5.
Its released models of 24 layers have 1e-5, those of 36 and 48 have 1e-6. Depth is that of the stack.
"""

from megadsl.config.model import ModelConfig, SchemeConfig
from megadsl.schemes.assemble import Parametrization, additions, embedding_tables, equal_stds, head_plan, stack_layers
from megadsl.schemes.vanilla import STD
from megadsl.theory.shape import Sublayer


def parametrize(model: ModelConfig, scheme: SchemeConfig, vocab_size: int) -> Parametrization:
    """The numbers of LayerScale."""
    sublayers = [
        Sublayer(stack, layer, kind, 1.0, initial_gate(stack_layers(model, stack)), equal_stds(kind, STD))
        for stack, layer, kind in additions(model)
    ]
    return Parametrization("layerscale", embedding_tables(model, STD), sublayers, head_plan(model, 1.0, STD, STD), gate="channel")


def initial_gate(layers: int) -> float:
    """Where the factors of a stack of that depth start."""
    if layers <= 18:
        return 0.1
    return 1e-5 if layers <= 24 else 1e-6
