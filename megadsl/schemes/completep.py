"""`completep` and `depth_mup`: hyperparameters that carry over from a small model to a deep and wide one (CompleteP, arXiv
2505.01618, table 1; depth-muP, arXiv 2310.02244).

x + m_L^-a f(N(x)), a = 1 (completep) or 1/2 (depth_mup), m_L = L / base_num_layers

With m_N = hidden_size / base_hidden_size, and in units of the optimizer's own numbers:
  matrices of the layers   std .02 m_N^-1/2   lr m_N^-1 m_L^(a-1)   eps m_N^-1 m_L^-a   weight_decay m_N
  norms, biases, gates     -                  lr m_L^(a-1)          eps m_N^-1 m_L^-a
  tables, output matrix    std .02            lr 1                  eps m_N^-1          logits times m_N^-1
as in the authors' code (nanoGPT-mup), but for its one eps, which takes the factor of the layers for the tables too; table 1, as
others transcribe it, has the two. Roles do not tell the final norm and head from those of the layers, so depth_mup lowers their
lr by m_L^-1/2 where the paper has 1. BERT's dense transform follows the width's rules alone. L counts all layers of an
encoder_decoder, which the paper does not have. Scores keep 1/sqrt(d_h), which is muP's 1/d_h when the width grows by heads of one
size.
"""

import math

from megadsl.config.model import ModelConfig, SchemeConfig
from megadsl.schemes.assemble import Parametrization, additions, embedding_tables, equal_stds, head_plan, stack_layers
from megadsl.schemes.vanilla import STD
from megadsl.theory.shape import Sublayer

HIDDEN_MATRICES = ("query_key_value", "query", "key", "value", "key_value", "attention_output", "fc1", "fc2")
VECTORS = ("norm_weight", "norm_bias", "bias", "residual_gate")
TABLES = ("word_embedding", "position_embedding", "tokentype_embedding", "output_head")


def completep(model: ModelConfig, scheme: SchemeConfig, vocab_size: int) -> Parametrization:
    """The numbers of CompleteP."""
    return _draft("completep", 1.0, model, scheme)


def depth_mup(model: ModelConfig, scheme: SchemeConfig, vocab_size: int) -> Parametrization:
    """The numbers of depth-muP."""
    return _draft("depth_mup", 0.5, model, scheme)


def _draft(name: str, exponent: float, model: ModelConfig, scheme: SchemeConfig) -> Parametrization:
    width = model.hidden_size / scheme.base_hidden_size
    depth = sum(stack_layers(model, stack) for stack in {stack for stack, _, _ in additions(model)}) / scheme.base_num_layers
    hidden = STD / math.sqrt(width)
    sublayers = [
        Sublayer(stack, layer, kind, 1.0, depth ** -exponent, equal_stds(kind, hidden)) for stack, layer, kind in additions(model)
    ]
    return Parametrization(name, embedding_tables(model, STD), sublayers, head_plan(model, 1.0 / width, STD, hidden),
                 role_factors=role_factors(width, depth, exponent))


def role_factors(width: float, depth: float, exponent: float) -> dict[str, dict[str, float]]:
    """Optimizer factors by role for m_N, m_L and a; factors of 1 are left out."""
    eps = depth ** -exponent / width
    rules = [
        (HIDDEN_MATRICES, {"lr": depth ** (exponent - 1.0) / width, "eps": eps, "weight_decay": width}),
        (VECTORS, {"lr": depth ** (exponent - 1.0), "eps": eps}),
        (TABLES, {"eps": 1.0 / width}),
        (("head_dense",), {"lr": 1.0 / width, "eps": 1.0 / width, "weight_decay": width}),
    ]
    found = {
        role: {name: factor for name, factor in factors.items() if factor != 1.0} for roles, factors in rules for role in roles
    }
    return {role: factors for role, factors in found.items() if factors}
