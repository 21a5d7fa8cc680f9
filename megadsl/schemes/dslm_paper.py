"""`dslm_paper`: the recipe as released with arXiv 2403.09635, for comparison with `dslm`.

as `dslm`, but value and attention_output from 1 / r, r from r_0 = .221, and both FFN matrices of std^2 = sqrt((1 - p) / 2) / d

Where it differs: value and attention_output follow the *r-rule* kappa_v kappa_o = (1 - p) / r, from a scalar recursion of r that
starts at r0 = 0.221 whatever the data and takes every branch to be bidirectional, ReLU and of unit variance; both FFN matrices
have std^2 = sqrt((1 - p) / 2) / d (right for ReLU and d_f = 4d; for other widths the symmetric choice sqrt(2 (1 - p) / (d d_f))).
lambda^2 = .995, beta^2 = .005 at 192 layers is k = 1.92; here beta^2 = k / S, so scheme.k=1.92 gives the released numbers
exactly.
"""

import math

from megadsl.config.model import ModelConfig, SchemeConfig
from megadsl.schemes.assemble import Parametrization, additions
from megadsl.schemes.dslm import residual_scales, unit_gain, unit_head, unit_tables
from megadsl.theory.shape import Sublayer

INITIAL_CORRELATION = 0.221


def parametrize(model: ModelConfig, scheme: SchemeConfig, vocab_size: int) -> Parametrization:
    """The numbers of the released recipe."""
    p, d = model.hidden_dropout, model.hidden_size
    unit = d ** -0.5
    fc = (2.0 * (1.0 - p) / (d * model.ffn_size)) ** 0.25
    r = {"encoder": INITIAL_CORRELATION * (1.0 - p), "decoder": INITIAL_CORRELATION * (1.0 - p)}
    sublayers, scales = [], residual_scales(model, scheme)
    for stack, layer, kind in additions(model):
        residual, branch = scales[stack]
        if kind == "ffn":
            weights = {"fc1": fc, "fc2": fc}
            branch_correlation = (1.0 - p) * relu_correlation(r[stack])
        else:
            # A query attends to the memory in cross-attention, so its correlation is the one that the average inherits.
            keys = r["encoder"] if kind == "cross_attention" else r[stack]
            output = ((1.0 - p) / keys) ** 0.25 * unit
            weights = {"query": unit, "key": unit, "value": output, "attention_output": output}
            branch_correlation = 1.0 - p
        r[stack] = residual ** 2 * r[stack] + branch ** 2 * branch_correlation
        sublayers.append(Sublayer(stack, layer, kind, residual, branch, weights))
    tables = unit_tables(model)
    return Parametrization("dslm_paper", tables, sublayers, unit_head(model, tables), unit_tables=True, embedding_gain=unit_gain(model))


def relu_correlation(r: float) -> float:
    """Token correlation (overlap over second moment) behind a ReLU: r + (sqrt(1 - r^2) - r arccos r) / pi."""
    return r + (math.sqrt(1.0 - r * r) - r * math.acos(r)) / math.pi
