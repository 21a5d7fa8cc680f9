"""Sections `tokenizer` and `data`: what the model reads."""

from typing import Literal

from pydantic import Field, field_validator

from megadsl.config.section import Section


class TokenizerConfig(Section):
    """The SentencePiece model that the datasets were made with."""

    model: str = Field("tokenizer.model", description="SentencePiece model file (megadsl tokenizer train makes one)")
    make_vocab_size_divisible_by: int = Field(
        128, ge=1, description="the vocabulary is padded to a multiple of this; tensor_model_parallel_size must divide it"
    )

    def padded_vocab_size(self, vocab_size: int) -> int:
        """The vocabulary of the model. It does not depend on the layout, so that weights do not either."""
        multiple = self.make_vocab_size_divisible_by
        return -(-vocab_size // multiple) * multiple


class DatasetConfig(Section):
    """One dataset folder of `megadsl data preprocess` and its weight in the blend."""

    path: str
    weight: float = Field(1.0, gt=0)


class DataConfig(Section):
    """Which datasets are read, in which proportion, and what the model has to predict of them (by model.family)."""

    datasets: tuple[DatasetConfig, ...] = Field((), description="dataset folders; a plain path stands for {path: ..., weight: 1}")
    num_workers: int = Field(1, ge=0, description="reader processes per rank; 0 reads in the training process")
    reset_position_ids: bool = Field(False, description="positions start again at every document of a sequence (decoder, encoder)")
    reset_attention_mask: bool = Field(False, description="no attention across documents of a sequence (decoder, encoder)")
    eod_mask_loss: bool = Field(False, description="no loss on the token after a document's end (decoder)")
    prefix_lm: bool = Field(False, description="a random prefix of a sequence is seen from both sides and not predicted (decoder)")
    masking_probability: float = Field(0.15, gt=0, lt=1, description="share of the text tokens that an encoder predicts")
    masking_do_full_word: bool = Field(False, description="choose whole words for masking, not pieces (encoder)")
    sentence_order: bool = Field(
        False, description="also predict whether two halves are swapped, as ALBERT (encoder; needs model.num_tokentypes of 2)"
    )
    denoising: Literal["span_corruption", "infilling"] = Field(
        "span_corruption", description="of an encoder_decoder: T5's (sentinels for spans) or BART's (one <mask> for a span)"
    )
    noise_density: float = Field(0.15, gt=0, lt=1, description="share of the tokens in noise spans (T5 0.15, BART 0.3)")
    mean_noise_span_length: float = Field(3.0, ge=1, description="mean tokens in a noise span (infilling: of a Poisson law)")

    @field_validator("datasets", mode="before")
    @classmethod
    def _plain_paths(cls, value):
        if isinstance(value, str):
            value = [value]
        return [{"path": item} if isinstance(item, str) else item for item in value or ()]
