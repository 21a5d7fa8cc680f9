"""How many raw tokens a sample of each objective is made from, and what fits into the model's lengths. Without torch.

Span corruption follows T5 (arXiv 1910.10683; random_spans_helper of its code): the raw window is as long as the corrupted
source, with its sentinels and the final eos, fills s exactly. Shape letters: s = model.seq_length, t = model.target_length.
"""

from typing import NamedTuple

from megadsl.config import Config
from megadsl.data.tokenizer import Tokenizer
from megadsl.errors import UserError


class Window(NamedTuple):
    """`length` new tokens and `overlap` tokens that the next window of the stream holds too."""

    length: int
    overlap: int = 0


class Spans(NamedTuple):
    """Span corruption of a raw window of `length` tokens: `noise` of them in `count` spans."""

    length: int
    noise: int
    count: int

    @property
    def source(self) -> int:
        """Source tokens: what is left, one sentinel a span, eos."""
        return self.length - self.noise + self.count + 1

    @property
    def target(self) -> int:
        """Target tokens: every span after its sentinel, eos."""
        return self.noise + self.count + 1


def raw_window(config: Config) -> Window:
    """The raw tokens of a sample; UserError where the model's lengths leave no room."""
    s, family, data = config.model.seq_length, config.model.family, config.data
    if family == "decoder":
        shortest, window = 2 if data.prefix_lm else 1, Window(s, overlap=1)
    elif family == "encoder":
        # [CLS] text [SEP], or [CLS] A [SEP] B [SEP]; two tokens of text, so that one of them is not an end of document.
        special = 3 if data.sentence_order else 2
        shortest, window = special + 2, Window(s - special)
    elif data.denoising == "infilling":
        shortest, window = 3, Window(s - 1)
    else:
        shortest, window = 3, Window(spans_of(s, data.noise_density, data.mean_noise_span_length).length if s >= 3 else 0)
    if s < shortest:
        raise UserError(f"model.seq_length {s} is too short for this objective; set model.seq_length to at least {shortest}.")
    return window


def spans_of(source_length: int, noise_density: float, mean_length: float) -> Spans:
    """The longest raw window whose corrupted source has `source_length` >= 3 tokens; T5's counts of noise and spans."""
    spans = _spans(source_length - 1, noise_density, mean_length)
    while (longer := _spans(spans.length + 1, noise_density, mean_length)).source <= source_length:
        spans = longer
    if spans.count > spans.length - spans.noise or spans.source != source_length:
        raise UserError(
            f"data.noise_density {noise_density} with data.mean_noise_span_length {mean_length} leaves too few tokens between "
            "the spans; lower the density or make the spans longer."
        )
    return spans


def _spans(length: int, noise_density: float, mean_length: float) -> Spans:
    noise = min(max(round(length * noise_density), 1), length - 1)
    return Spans(length, noise, max(round(noise / mean_length), 1))


def filled_target(config: Config) -> int:
    """Target tokens that every sample of an encoder_decoder fills; the rest of model.target_length is padding."""
    if config.data.denoising == "infilling":
        return config.model.seq_length
    return spans_of(config.model.seq_length, config.data.noise_density, config.data.mean_noise_span_length).target


def check_objective(config: Config, tokenizer: Tokenizer) -> None:
    """UserError unless the tokenizer has the pieces and the model the lengths that the configured objective needs."""
    raw_window(config)
    data, model = config.data, config.model
    if model.family == "encoder":
        _ = tokenizer.mask, tokenizer.cls, tokenizer.sep
    if model.family != "encoder_decoder":
        return
    _ = tokenizer.bos, tokenizer.eos
    if data.denoising == "infilling":
        _ = tokenizer.mask
    else:
        spans = spans_of(model.seq_length, data.noise_density, data.mean_noise_span_length)
        sentinels = len(tokenizer.additional_special_tokens_ids)
        if sentinels < spans.count:
            raise UserError(
                f"Span corruption at model.seq_length {model.seq_length} needs {spans.count} sentinels, but the tokenizer "
                f"{tokenizer.name} has {sentinels}; make one with megadsl tokenizer train --num-sentinels {spans.count}, or set "
                "a longer data.mean_noise_span_length."
            )
    needed = filled_target(config)
    if model.target_length < needed:
        raise UserError(
            f"model.decoder_seq_length {model.target_length} is too short for data.denoising {data.denoising} at "
            f"model.seq_length {model.seq_length}; set model.decoder_seq_length={needed}."
        )
