"""Options of the tasks that write texts."""

from typing import Literal

from pydantic import Field

from megadsl.config.section import Section


class TargetTextOptions(Section):
    """How targets are learnt and judged, and in which order examples come."""

    label_smoothing: float = Field(0.1, ge=0, lt=1, description="share of a label's probability that goes to all pieces alike")
    bucket_batches: int = Field(
        16, ge=0, description="global batches whose examples are sorted by length together, so that a batch holds little padding; 0: none"
    )
    max_train_examples: int | None = Field(None, ge=1, description="learn from the first so many examples of the train split only")
    scores: Literal["translation", "recognition"] = Field(
        "translation", description="what megadsl evaluate reports of hypotheses: BLEU and chrF, or word and character error rate"
    )
