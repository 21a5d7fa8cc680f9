"""How many raw tokens a sample of span corruption is made from. Without torch.

It follows T5 (arXiv 1910.10683; random_spans_helper of its code): the raw window is as long as the corrupted source, with its
sentinels and the final eos, fills s exactly. Shape letters: s = model.seq_length.
"""

from typing import NamedTuple

from megadsl.errors import UserError


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


def spans_of(source_length: int, noise_density: float, mean_length: float) -> Spans:
    """The longest raw window whose corrupted source has `source_length` >= 3 tokens; T5's counts of noise and spans."""
    spans = _spans(source_length - 1, noise_density, mean_length)
    while (longer := _spans(spans.length + 1, noise_density, mean_length)).source <= source_length:
        spans = longer
    if spans.count > spans.length - spans.noise or spans.source != source_length:
        raise UserError(
            f"task.noise_density {noise_density} with task.mean_noise_span_length {mean_length} leaves too few tokens between "
            "the spans; lower the density or make the spans longer."
        )
    return spans


def _spans(length: int, noise_density: float, mean_length: float) -> Spans:
    noise = min(max(round(length * noise_density), 1), length - 1)
    return Spans(length, noise, max(round(noise / mean_length), 1))
