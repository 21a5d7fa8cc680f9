"""`deepnorm`: Post-LN with a stronger skip and smaller branches (DeepNet, arXiv 2203.00555).

N(alpha x + f(x)), alpha = (2 L)^(1/4); Glorot stds, those of value, attention_output, fc1, fc2 times beta = (8 L)^(-1/4)

  one stack of L layers       alpha = (2 L)^(1/4)                  beta = (8 L)^(-1/4)
  encoder of encoder_decoder  alpha = .81 (L_e^4 L_d)^(1/16)       beta = .87 (L_e^4 L_d)^(-1/16)
  decoder of encoder_decoder  alpha = (3 L_d)^(1/4)                beta = (12 L_d)^(-1/4)
lambda = alpha and the plan's beta is 1: the paper's beta is in the stds. Tables and head are those of `dslm`: the authors' code
(torchscale) multiplies embeddings of std d^-1/2 by sqrt(d), so it starts from unit scale as well. That code has a gain of
1.15 (L_e^4 L_d)^(-1/16) in the encoder of an encoder_decoder (it divides by (.)/1.15, and 1/.87 = 1.15), not the paper's .87; the
paper's is used here, checked against the table of the paper as reprinted in labml.ai's annotated implementation.
"""

from megadsl.config.model import ModelConfig, SchemeConfig
from megadsl.schemes.assemble import Parametrization, additions, stack_layers
from megadsl.schemes.dslm import unit_head, unit_tables
from megadsl.schemes.xavier import glorot_stds
from megadsl.theory.shape import Sublayer

SCALED = ("value", "attention_output", "fc1", "fc2")


def parametrize(model: ModelConfig, scheme: SchemeConfig, vocab_size: int) -> Parametrization:
    """The numbers of DeepNorm."""
    sublayers = []
    for stack, layer, kind in additions(model):
        alpha, beta = constants(model, stack)
        stds = {role: std * beta if role in SCALED else std for role, std in glorot_stds(model, kind).items()}
        sublayers.append(Sublayer(stack, layer, kind, alpha, 1.0, stds))
    tables = unit_tables(model)
    return Parametrization("deepnorm", tables, sublayers, unit_head(model, tables), unit_tables=True)


def constants(model: ModelConfig, stack: str) -> tuple[float, float]:
    """(alpha, beta) of one stack."""
    layers = stack_layers(model, stack)
    if model.family != "encoder_decoder":
        return (2.0 * layers) ** 0.25, (8.0 * layers) ** -0.25
    if stack == "decoder":
        return (3.0 * layers) ** 0.25, (12.0 * layers) ** -0.25
    both = (layers ** 4 * model.decoder_layers) ** (1.0 / 16.0)
    return 0.81 * both, 0.87 / both
