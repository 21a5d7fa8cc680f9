"""FLOPs of a model and what a run achieves of them.

Matrix multiplications only, counted as in PaLM (arXiv 2204.02311, appendix B): backward costs twice the forward, causal
attention counts the half of the score matrix that is used, and recomputation is not counted.
Shape letters: h hidden, d head size, n heads, g query groups, f FFN size, v padded vocabulary.
"""

from megadsl.config.model import ModelConfig


def tokens_per_sequence(model: ModelConfig) -> int:
    """Tokens that flow through layers for one sequence: source and target of an encoder-decoder."""
    return model.seq_length + (model.target_length if model.family == "encoder_decoder" else 0)


def tokens_counted(model: ModelConfig) -> str:
    """What the rate throughput/tokens_per_second counts, in words."""
    return "source and target tokens" if model.family == "encoder_decoder" else "tokens"


def forward_flops(model: ModelConfig, padded_vocab_size: int) -> float:
    """Floating-point operations of one forward pass over one sequence."""
    causal, source, target = model.family == "decoder", model.seq_length, model.target_length
    total = model.num_layers * source * (_layer(model) + _scores(model, source / 2 if causal else source))
    predicted = source
    if model.family == "encoder_decoder":
        predicted = target
        # The cross-attention of a layer projects queries and outputs of the target, keys and values of the source.
        projection = 2 * model.hidden_size * model.head_dim * model.num_attention_heads
        cross = target * (projection + _scores(model, source)) + source * projection
        total += model.decoder_layers * (target * (_layer(model) + _scores(model, target / 2)) + cross)
    head = model.hidden_size * padded_vocab_size + (model.hidden_size ** 2 if model.family == "encoder" else 0)
    return 2.0 * (total + predicted * head)


def training_flops(model: ModelConfig, padded_vocab_size: int) -> float:
    """Forward and backward of one sequence."""
    return 3.0 * forward_flops(model, padded_vocab_size)


def _layer(model: ModelConfig) -> float:
    """Multiplications of a layer's matrices per token: self-attention's projections and the FFN."""
    h, d = model.hidden_size, model.head_dim
    projections = h * d * (model.num_attention_heads + 2 * model.query_groups) + model.num_attention_heads * d * h
    return projections + (3 if model.gated else 2) * h * model.ffn_size


def _scores(model: ModelConfig, keys: float) -> float:
    """Multiplications of scores and weighted values per query."""
    return 2 * model.num_attention_heads * model.head_dim * keys
