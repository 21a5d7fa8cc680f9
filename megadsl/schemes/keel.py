"""`keel`: Post-LN with a strong skip and a second norm in front of the branch (Keel, arXiv 2601.19895).

N(alpha x + f(N(x))), alpha = S residual additions of the stack, every std .02

Goes with model.norm_position=post; there is no further norm at the end. Checked against abstracts and summaries of the paper and
against two independent re-implementations, which agree on the form and on alpha = number of sublayers. Not checked, because the
paper's own text was not at hand: whether its first layer is left Pre-LN (one re-implementation does that; here it is not), and
its stds (it says that no special initialisation is needed; .02 is `vanilla` without the factor of the last matrix).
"""

from megadsl.config.model import ModelConfig, SchemeConfig
from megadsl.schemes.assemble import Parametrization, additions, embedding_tables, equal_stds, head_plan, num_additions
from megadsl.schemes.vanilla import STD
from megadsl.theory.shape import Sublayer


def parametrize(model: ModelConfig, scheme: SchemeConfig, vocab_size: int) -> Parametrization:
    """The numbers of Keel."""
    counts = num_additions(model)
    sublayers = [
        Sublayer(stack, layer, kind, float(counts[stack]), 1.0, equal_stds(kind, STD)) for stack, layer, kind in additions(model)
    ]
    return Parametrization("keel", embedding_tables(model, STD), sublayers, head_plan(model, 1.0, STD, STD), norm_position="both")
