"""`dslm`: DeepScaleLM (arXiv 2403.09635) with the true moments of every branch.

lambda x + beta f(N(x)) or N(lambda x + beta f(x)), lambda^2 = 1 - k / S, beta^2 = k / S, f of second moment 1

Derived in THEORY.md, sections 6, 7, 11:
  lambda^2 = 1 - beta^2, beta^2 = k / S with S residual additions in the stack (2 per layer; 3 per decoder layer of an
      encoder_decoder). k fixes how much of the output comes from the branches whatever the depth; k = 2 is the released reference
      (THEORY.md, section 8).
  tables   std^2 = (1 - p) / (number of tables), so that the sum has second moment 1 after dropout
  query, key   std^2 = 1 / d, so that scores have variance 1 - r
  value, attention_output   equal, chosen so that the branch has second moment 1: kappa_v kappa_o = (1 - p) / mbar, where mbar is
      the second moment that averaging over keys leaves, as a mean over positions (the paper divides by r, which is off where r is
      small)
  fc1   std^2 = 1 / d; fc2 chosen from the activation's own second moment so that the branch has second moment 1
  head  logits of variance 1: tied, the hidden state is multiplied by 1 / (s_w sqrt(d)); untied, std^2 = 1 / d; BERT's dense
      transform std^2 = 1 / d
A norm on the embedding sum starts at gain sqrt(1 - p), which gives second moment 1 after dropout.
"""

import math

from megadsl.config.model import ModelConfig, SchemeConfig
from megadsl.errors import UserError
from megadsl.schemes.assemble import Parametrization, additions, embedding_tables, head_plan, num_additions
from megadsl.schemes.plan import HeadPlan
from megadsl.theory.shape import Sublayer


def parametrize(model: ModelConfig, scheme: SchemeConfig, vocab_size: int) -> Parametrization:
    """The numbers of DSLM."""
    unit = model.hidden_size ** -0.5
    attention = {"query": unit, "key": unit, "value": None, "attention_output": None}
    ffn = {"fc1": unit, "fc2": None}
    sublayers, scales = [], residual_scales(model, scheme)
    for stack, layer, kind in additions(model):
        residual, branch = scales[stack]
        sublayers.append(Sublayer(stack, layer, kind, residual, branch, ffn if kind == "ffn" else attention))
    tables = unit_tables(model)
    return Parametrization("dslm", tables, sublayers, unit_head(model, tables), unit_tables=True, embedding_gain=unit_gain(model))


def residual_scales(model: ModelConfig, scheme: SchemeConfig) -> dict[str, tuple[float, float]]:
    """(lambda, beta) by stack."""
    scales = {}
    for stack, count in num_additions(model).items():
        branch_weight = scheme.k / count
        if branch_weight >= 1.0:
            raise UserError(f"scheme.k {scheme.k} must be smaller than the {count} residual additions of the {stack} stack.")
        scales[stack] = math.sqrt(1.0 - branch_weight), math.sqrt(branch_weight)
    return scales


def unit_tables(model: ModelConfig) -> dict[str, float]:
    """Embedding stds whose sum has second moment 1 after dropout."""
    tables = embedding_tables(model, 1.0)
    return dict.fromkeys(tables, math.sqrt((1.0 - model.hidden_dropout) / len(tables)))


def unit_gain(model: ModelConfig) -> float:
    """Gain of a norm on the embedding sum that gives second moment 1 after dropout."""
    return math.sqrt(1.0 - model.hidden_dropout)


def unit_head(model: ModelConfig, tables: dict[str, float]) -> HeadPlan:
    """A head whose logits have variance 1."""
    unit = model.hidden_size ** -0.5
    hidden_scale = 1.0 if model.untie_embeddings_and_output_weights else unit / tables["word_embedding"]
    return head_plan(model, hidden_scale, unit, unit)
