"""What section `task` holds for the three language-modelling tasks."""

from typing import Literal

from pydantic import Field

from megadsl.config.section import Section


class LanguageOptions(Section):
    """Options of all of them."""

    z_loss: float = Field(
        0.0, ge=0, description="coefficient of logsumexp(logits)^2 for every predicted token, a part of the loss that keeps logits from "
        "drifting (PaLM: 1e-4); 0: no such part"
    )


class PackedOptions(LanguageOptions):
    """Options of the tasks whose sequences hold several documents."""

    reset_position_ids: bool = Field(False, description="positions start again at every document of a sequence")
    reset_attention_mask: bool = Field(False, description="no attention across documents of a sequence")

    @property
    def has_segments(self) -> bool:
        """Whether the model must know where documents begin."""
        return self.reset_position_ids or self.reset_attention_mask


class CausalOptions(PackedOptions):
    """Options of causal_language_modeling."""

    eod_mask_loss: bool = Field(False, description="no loss on the token after a document's end")
    prefix_lm: bool = Field(False, description="a random prefix of a sequence is seen from both sides and not predicted")


class MaskedOptions(PackedOptions):
    """Options of masked_language_modeling."""

    masking_probability: float = Field(0.15, gt=0, lt=1, description="share of the text tokens that are predicted")
    masking_do_full_word: bool = Field(False, description="choose whole words for masking, not pieces")
    sentence_order: bool = Field(
        False, description="also predict whether two halves are swapped, as ALBERT (needs model.num_tokentypes of 2)"
    )


class DenoisingOptions(LanguageOptions):
    """Options of denoising."""

    corruption: Literal["span_corruption", "infilling"] = Field(
        "span_corruption", description="T5's (sentinels for spans) or BART's (one <mask> for a span)"
    )
    noise_density: float = Field(0.15, gt=0, lt=1, description="share of the tokens in noise spans (T5 0.15, BART 0.3)")
    mean_noise_span_length: float = Field(3.0, ge=1, description="mean tokens in a noise span (infilling: of a Poisson law)")
