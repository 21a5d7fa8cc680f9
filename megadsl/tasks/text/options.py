"""What section `task` holds for the tasks over short texts."""

from typing import Literal

from pydantic import Field

from megadsl.config.section import Section


class TextOptions(Section):
    """Options of the tasks whose head reads one vector of a sequence."""

    pooling: Literal["auto", "first", "last", "mean"] = Field(
        "auto", description="what the head reads: the first token (auto in an encoder: <cls>), the last one that is not padding (auto in a "
        "decoder), or the mean of all"
    )


class ClassificationOptions(TextOptions):
    """Options of text_classification."""

    labels: tuple[str, ...] | None = Field(
        None, description="names of the labels in the order of their numbers (default: those of the dataset; none: a value is predicted)"
    )


class ChoiceOptions(TextOptions):
    """Options of multiple_choice."""

    num_options: int | None = Field(None, ge=2, description="options of a question (default: as many as in the dataset)")


class QuestionOptions(Section):
    """Options of question_answering."""

    doc_stride: int = Field(64, ge=1, description="tokens between the starts of two windows of a context that is longer than one")
    max_query_length: int = Field(48, ge=1, description="tokens of a question; the rest is cut off")
    max_answer_length: int = Field(30, ge=1, description="tokens of an answer")
    n_best: int = Field(20, ge=1, description="likeliest starts and ends of a window that are combined to spans")
    null_score_threshold: float = Field(
        0.0, description="a question has no answer where the score of none exceeds that of the best span by more; only where the dataset "
        "has such questions (SQuAD v2)"
    )
