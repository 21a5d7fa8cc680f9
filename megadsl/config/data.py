"""Sections `tokenizer` and `data`: what the model reads."""

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
    """Which datasets are read, and in which proportion."""

    datasets: tuple[DatasetConfig, ...] = Field((), description="dataset folders; a plain path stands for {path: ..., weight: 1}")
    num_workers: int = Field(1, ge=0, description="reader processes per rank; 0 reads in the training process")

    @field_validator("datasets", mode="before")
    @classmethod
    def _plain_paths(cls, value):
        if isinstance(value, str):
            value = [value]
        return [{"path": item} if isinstance(item, str) else item for item in value or ()]
