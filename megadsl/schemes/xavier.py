"""`xavier`: Glorot normal initialisation (Glorot and Bengio, AISTATS 2010).

x + f(N(x)) or N(x + f(x)), std^2 = 2 / (fan_in + fan_out) with the true fans of each role

lambda = beta = 1. The fan_out of query is all heads together, that of key and value all key/value heads (the figures of arXiv
2403.09635 count one head, which makes these stds larger: scheme choices differ here between code bases, so the number to trust is
the one in the plan). Tables have std d^-1/2: a table is no linear map, and its Glorot std would depend on the vocabulary. The
untied head is a linear map (d -> V).
"""

from megadsl.config.model import ModelConfig, SchemeConfig
from megadsl.schemes.assemble import Parametrization, additions, embedding_tables, glorot, head_plan
from megadsl.theory.shape import Sublayer


def parametrize(model: ModelConfig, scheme: SchemeConfig, vocab_size: int) -> Parametrization:
    """The numbers of Glorot initialisation."""
    d = model.hidden_size
    sublayers = [Sublayer(stack, layer, kind, 1.0, 1.0, glorot_stds(model, kind)) for stack, layer, kind in additions(model)]
    head = head_plan(model, 1.0, glorot(d, vocab_size), glorot(d, d))
    return Parametrization("xavier", embedding_tables(model, d ** -0.5), sublayers, head)


def glorot_stds(model: ModelConfig, kind: str) -> dict[str, float]:
    """Glorot stds of the matrices of a branch."""
    d, heads_width = model.hidden_size, model.num_attention_heads * model.head_dim
    if kind == "ffn":
        return {"fc1": glorot(d, model.ffn_size), "fc2": glorot(model.ffn_size, d)}
    shared = glorot(d, model.query_groups * model.head_dim)
    return {"query": glorot(d, heads_width), "key": shared, "value": shared, "attention_output": glorot(heads_width, d)}
