"""`layernorm_scaling`: Pre-LN whose norms are damped with depth (The Curse of Depth in LLMs, arXiv 2502.05795).

x + f(N(x) / sqrt(l)), l the layer counted from 1, every std .02

Both norms of a layer have the factor of the layer (a third one in the decoder of an encoder_decoder, which the paper does not
have, as well), the final norm has none; so in the authors' code, whose layers are LLaMA's with stds of .02. They ask to leave out
the 1/sqrt(2 L) of `vanilla`.
"""

from megadsl.config.model import ModelConfig, SchemeConfig
from megadsl.schemes.assemble import Parametrization, additions, embedding_tables, equal_stds, head_plan
from megadsl.schemes.vanilla import STD
from megadsl.theory.shape import Sublayer


def parametrize(model: ModelConfig, scheme: SchemeConfig, vocab_size: int) -> Parametrization:
    """The numbers of LayerNorm Scaling."""
    sublayers = [
        Sublayer(stack, layer, kind, 1.0, 1.0, equal_stds(kind, STD), norm_scale=(layer + 1) ** -0.5)
        for stack, layer, kind in additions(model)
    ]
    return Parametrization("layernorm_scaling", embedding_tables(model, STD), sublayers, head_plan(model, 1.0, STD, STD))
