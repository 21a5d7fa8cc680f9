"""FLOPs of a model and what a run achieves of them.

Matrix multiplications only, counted as in PaLM (arXiv 2204.02311, appendix B): backward costs twice the forward, causal
attention counts the half of the score matrix that is used, and recomputation is not counted.
Shape letters: h hidden, d head size, n heads, g query groups, f FFN size.
"""

from megadsl.config.model import ModelConfig


def forward_flops(model: ModelConfig, head_multiplications: float) -> float:
    """Floating-point operations of one forward pass over one sample; the task knows those of its head's matrices."""
    total, memory = head_multiplications, 0
    for stack, layers in model.stack_layers.items():
        length = model.stack_lengths[stack]
        keys = length / 2 if stack == "decoder" else length
        per_layer = length * (_layer(model) + _scores(model, keys))
        if memory:
            # Cross-attention projects queries and outputs of this stack's tokens, keys and values of the memory's.
            projection = 2 * model.hidden_size * model.head_dim * model.num_attention_heads
            per_layer += length * (projection + _scores(model, memory)) + memory * projection
        total += layers * per_layer
        memory = length
    return 2.0 * total


def training_flops(model: ModelConfig, head_multiplications: float) -> float:
    """Forward and backward of one sample."""
    return 3.0 * forward_flops(model, head_multiplications)


def _layer(model: ModelConfig) -> float:
    """Multiplications of a layer's matrices per token: self-attention's projections and the FFN."""
    h, d = model.hidden_size, model.head_dim
    projections = h * d * (model.num_attention_heads + 2 * model.query_groups) + model.num_attention_heads * d * h
    return projections + (3 if model.gated else 2) * h * model.ffn_size


def _scores(model: ModelConfig, keys: float) -> float:
    """Multiplications of scores and weighted values per query."""
    return 2 * model.num_attention_heads * model.head_dim * keys
