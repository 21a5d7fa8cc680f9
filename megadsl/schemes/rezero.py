"""`rezero`: no norms, and branches that start switched off (ReZero, arXiv 2003.04887).

x + a f(x), a = 0 at the start, a trained scalar

Goes with model.norm_position=pre, whose plain skip it shares, and has none of its norms: neither in the layers nor at the end, as
in the authors' code. That code shares one scalar between the sublayers of a layer; here every addition has its own. Glorot stds.
Tables and head are those of `dslm`: the paper does not fix them, and without norms nothing else would bring the stream to unit
scale.
"""

from megadsl.config.model import ModelConfig, SchemeConfig
from megadsl.schemes.assemble import Parametrization, additions
from megadsl.schemes.dslm import unit_head, unit_tables
from megadsl.schemes.xavier import glorot_stds
from megadsl.theory.shape import Sublayer


def parametrize(model: ModelConfig, scheme: SchemeConfig, vocab_size: int) -> Parametrization:
    """The numbers of ReZero."""
    sublayers = [Sublayer(stack, layer, kind, 1.0, 0.0, glorot_stds(model, kind)) for stack, layer, kind in additions(model)]
    tables = unit_tables(model)
    return Parametrization("rezero", tables, sublayers, unit_head(model, tables), unit_tables=True, norm_position="none", gate="scalar")
