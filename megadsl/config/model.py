"""Sections `model` and `scheme`: the shape of the transformer and how its signal is scaled.

Field names are Megatron's. Everything that the theory needs to know of a model stands here.
"""

from typing import Literal

from pydantic import Field, model_validator

from megadsl.config.section import Section

Family = Literal["decoder", "encoder", "encoder_decoder"]
Activation = Literal["relu", "gelu", "tanh_gelu", "silu", "squared_relu", "swiglu", "geglu"]
# The stacks of each family, in forward order.
_STACKS = {"decoder": ("decoder",), "encoder": ("encoder",), "encoder_decoder": ("encoder", "decoder")}
GATED_ACTIVATIONS = frozenset({"swiglu", "geglu"})


class ModelConfig(Section):
    """Shape and parts of the transformer."""

    family: Family = Field("decoder", description="decoder (GPT-like), encoder (BERT-like) or encoder_decoder (T5-like)")
    norm_position: Literal["pre", "post"] = Field("pre", description="pre: x + f(norm(x)); post: norm(x + f(x))")
    num_layers: int = Field(12, ge=1, description="transformer layers (of the encoder, in an encoder_decoder)")
    num_decoder_layers: int | None = Field(None, ge=1, description="decoder layers of an encoder_decoder (default: num_layers)")
    hidden_size: int = Field(256, ge=1, description="width of the residual stream")
    ffn_hidden_size: int | None = Field(None, ge=1, description="width inside the FFN (default: 4 * hidden_size)")
    num_attention_heads: int = Field(4, ge=1)
    num_query_groups: int | None = Field(None, ge=1, description="key/value heads (default: num_attention_heads)")
    kv_channels: int | None = Field(None, ge=1, description="size of a head (default: hidden_size / num_attention_heads)")
    seq_length: int = Field(128, ge=1, description="tokens in a training sequence")
    decoder_seq_length: int | None = Field(
        None, ge=1, description="target tokens of an encoder_decoder (default: seq_length; megadsl data show names what is enough)"
    )
    activation: Activation = Field("gelu", description="FFN activation; swiglu and geglu are gated units")
    normalization: Literal["LayerNorm", "RMSNorm"] = "LayerNorm"
    layernorm_epsilon: float = Field(1e-5, gt=0)
    position_embedding_type: Literal["learned_absolute", "sinusoidal", "rope", "relative", "none"] = Field(
        "learned_absolute", description="relative: T5's bias on attention scores, one table a stack, 0 at the start"
    )
    rotary_base: float = Field(10000.0, gt=0)
    relative_attention_num_buckets: int = Field(32, ge=4, description="rows of the relative bias table")
    relative_attention_max_distance: int = Field(128, ge=2, description="distance from which all share the last bucket")
    qk_layernorm: bool = Field(False, description="normalise queries and keys per head")
    attention_logit_softcap: float = Field(
        0.0, ge=0, description="c of c * tanh(score / c) on attention scores, as in Gemma 2 (50); 0: scores are not capped"
    )
    num_tokentypes: int = Field(0, ge=0, description="rows of the token-type (segment) table; 0: no table")
    embedding_layernorm: bool = Field(False, description="normalise the embedding sum, as BERT and BART do")
    add_bias_linear: bool = Field(True, description="biases on all linear layers")
    untie_embeddings_and_output_weights: bool = Field(False, description="true: the LM head has a matrix of its own")
    hidden_dropout: float = Field(0.0, ge=0, lt=1, description="dropout on embeddings and on every branch")
    attention_dropout: float = Field(0.0, ge=0, lt=1, description="dropout on attention probabilities")

    @model_validator(mode="after")
    def _divisible(self) -> "ModelConfig":
        if self.kv_channels is None and self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not divisible by num_attention_heads {self.num_attention_heads}; "
                "change one of them or set kv_channels"
            )
        if self.num_attention_heads % self.query_groups:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not divisible by num_query_groups {self.query_groups}"
            )
        return self

    @property
    def ffn_size(self) -> int:
        return self.ffn_hidden_size or 4 * self.hidden_size

    @property
    def query_groups(self) -> int:
        return self.num_query_groups or self.num_attention_heads

    @property
    def head_dim(self) -> int:
        return self.kv_channels or self.hidden_size // self.num_attention_heads

    @property
    def stack_layers(self) -> dict[str, int]:
        """Layers by stack, in forward order."""
        stacks = _STACKS[self.family]
        return {stack: self.decoder_layers if stack != stacks[0] else self.num_layers for stack in stacks}

    @property
    def stack_lengths(self) -> dict[str, int]:
        """Positions that flow through each stack for one sample."""
        stacks = _STACKS[self.family]
        return {stack: self.target_length if stack != stacks[0] else self.seq_length for stack in stacks}

    @property
    def decoder_layers(self) -> int:
        return self.num_decoder_layers or self.num_layers

    @property
    def target_length(self) -> int:
        return self.decoder_seq_length or self.seq_length

    @property
    def gated(self) -> bool:
        return self.activation in GATED_ACTIVATIONS


class SchemeConfig(Section):
    """Initialisation and residual scaling. `scheme: dslm` is short for `scheme: {name: dslm}`."""

    name: str = Field("dslm", description="a scheme of megadsl.schemes (docs/theory.md has the table; megadsl plan --compare all)")
    k: float = Field(2.0, gt=0, description="total branch weight of DSLM: beta^2 = k / (number of residual additions)")
    base_num_layers: int = Field(2, ge=1, description="depth of the small model that completep and depth_mup carry over from")
    base_hidden_size: int = Field(256, ge=1, description="width of the small model that completep and depth_mup carry over from")
