"""Token statistics of a task's input, the Zipf fallback, and the moments of an embedding sum (THEORY.md, section 1).

With tables of std s_w, s_p, s_t, the stream at position t is x_t = E[word_t] + P[t] + S[type_t], so per coordinate
    q   = s_w^2 + s_p^2 + s_t^2                      second moment
    c   = pi_2 s_w^2 + sigma_typ s_t^2               overlap of two positions
with pi_2 = P(two positions hold the same word) and sigma_typ = P(same token type). A norm on the sum whose gain is g: both times
g^2 / (q + eps). Dropout p afterwards: q / (1-p), c unchanged.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megadsl.errors import UserError
from megadsl.theory.shape import Embedding, PositionMoments


@dataclass(frozen=True)
class TokenStatistics:
    """What the theory needs to know of a task's input and targets (of a corpus `megadsl data stats` measures it).

    Attributes:
        vocab_size: size of the vocabulary, or number of outputs.
        repeat_probability: pi_2 = sum_i p_i^2, the chance that two tokens drawn from the corpus are equal.
        repeat_probability_in_sequence: the same for two positions of one training sequence; text is bursty, so it is larger.
        unigram_entropy: in nats; not used by the theory, shown to the user.
        num_tokens: tokens counted; 0 for an assumed distribution.
        same_type_probability: that two positions of a sequence have the same token type; None: 1 with one type, 2/3 (two
            segments, cut anywhere) with more.
        masking_probability: share f of positions that a masked-language model predicts; None: the input is not masked.
        projected_size: None where words are looked up in a table. Else vectors of this size are projected into the stream, and
            repeat_probability is the mean overlap of two vectors of a sequence over their second moment.
        projected_second_moment: of those vectors, per coordinate.
        z_loss: coefficient of logsumexp(logits)^2 beside the cross-entropy.
        inner_projection_std: of the weights in front of that projection, where vectors go through two layers on their way in (the task
            chooses it; the moments above are those of what the second one reads).
        label_smoothing: share of a label's probability that goes to all outputs alike.
        spread: second moments of what is projected, of equal shares of all positions in ascending order, over their mean (loud and
            silent frames of speech); (): all positions alike.
        target: of an encoder_decoder whose two sides read different things: what the decoder reads and predicts; None: the same.
        gradient_correlation: of the gradient at the head's input; None: that of a cross-entropy at every position. A head that
            reads one token gives 0, one that reads the mean of all gives 1.
        length: positions of a sequence that are not padding (attention averages over 1/length: their harmonic mean); None: all.
        positions: moments by position, where positions are not alike; None: repeat_probability says it all.
        read_position: the only position that the head reads (0: a class token's, -1: the last); None: it reads all alike.
        class_token: a learned vector stands in front of the projected ones, drawn with their mean second moment.
    """

    vocab_size: int
    repeat_probability: float
    repeat_probability_in_sequence: float | None = None
    unigram_entropy: float | None = None
    num_tokens: int = 0
    same_type_probability: float | None = None
    masking_probability: float | None = None
    projected_size: int | None = None
    projected_second_moment: float = 1.0
    z_loss: float = 0.0
    gradient_correlation: float | None = None
    length: float | None = None
    positions: PositionMoments | None = None
    read_position: int | None = None
    class_token: bool = False
    inner_projection_std: float | None = None
    label_smoothing: float = 0.0
    spread: tuple[float, ...] = ()
    target: "TokenStatistics | None" = None

    @property
    def content_gain(self) -> float:
        """Second moment of what enters the stream for weights of variance 1: a table's rows, or d_in q of a projection."""
        return 1.0 if self.projected_size is None else self.projected_size * self.projected_second_moment

    @property
    def repeats(self) -> float:
        """pi_2 as the embedding sees it: measured within sequences where that is known."""
        if self.repeat_probability_in_sequence is not None:
            return self.repeat_probability_in_sequence
        return self.repeat_probability

    @property
    def input_repeats(self) -> float:
        """pi_2 of what the model reads: of the share f of positions 80 % hold the same mask token, 10 % a random word."""
        f = self.masking_probability or 0.0
        kept = (1.0 - 0.9 * f) ** 2
        return kept * self.repeats + (0.8 * f) ** 2 + ((1.0 - 0.8 * f) ** 2 - kept) / self.vocab_size

    @classmethod
    def load(cls, path: Path | str) -> "TokenStatistics":
        """Read the `stats.json` of a dataset.

        Raises:
            UserError: the file cannot be read or misses a number.
        """
        path = Path(path)
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            in_sequence = values.get("repeat_probability_in_sequence")
            statistics = cls(
                vocab_size=int(values["vocab_size"]), repeat_probability=float(values["repeat_probability"]),
                repeat_probability_in_sequence=None if in_sequence is None else float(in_sequence),
                unigram_entropy=values.get("unigram_entropy"), num_tokens=int(values.get("num_tokens", 0)),
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            way_out = "write it anew with `megadsl data stats`"
            raise UserError(f"{path} does not hold token statistics ({error!r}); {way_out}.") from error
        if not 0.0 <= statistics.repeats <= 1.0:
            raise UserError(f"{path}: repeat_probability {statistics.repeats} is not a probability.")
        return statistics


def zipf(vocab_size: int, exponent: float = 1.0) -> TokenStatistics:
    """Statistics of a Zipf corpus, p_i ~ i^-exponent: pi_2 = H_V^(2a) / (H_V^(a))^2, summed exactly."""
    weights = np.arange(1, vocab_size + 1, dtype=float) ** -exponent
    probabilities = weights / weights.sum()
    entropy = float(-(probabilities * np.log(probabilities)).sum())
    return TokenStatistics(vocab_size, float((probabilities ** 2).sum()), None, entropy)


def mixed(parts: list[tuple[TokenStatistics, float]]) -> TokenStatistics:
    """Statistics of a blend: every sequence comes from one dataset, so what holds within a sequence is averaged by weight."""
    if len(parts) == 1:
        return parts[0][0]
    total = sum(weight for _, weight in parts)
    return TokenStatistics(
        vocab_size=max(statistics.vocab_size for statistics, _ in parts),
        repeat_probability=sum(weight * statistics.repeats for statistics, weight in parts) / total,
        num_tokens=sum(statistics.num_tokens for statistics, _ in parts),
    )


def embedding_moments(embedding: Embedding, dropout: float = 0.0, eps: float = 0.0) -> tuple[float, float]:
    """(q, c): second moment and mean overlap of two positions of the embedding sum, after its norm and dropout."""
    word = embedding.word_std ** 2
    position = (embedding.position_std or 0.0) ** 2
    tokentype = (embedding.tokentype_std or 0.0) ** 2
    q = word + position + tokentype
    c = embedding.repeat_probability * word + embedding.same_type_probability * tokentype
    scale = 1.0 if embedding.norm_gain is None else embedding.norm_gain ** 2 / (q + eps)
    return scale * q / (1.0 - dropout), scale * c


def sinusoidal_overlap(distance: np.ndarray, hidden_size: int) -> np.ndarray:
    """rho(D) = (2/d) sum_i cos(D * 10000^(-2i/d)): normalised overlap of two sinusoidal positions at distance D."""
    frequencies = 10000.0 ** (-np.arange(0, hidden_size, 2) / hidden_size)
    return np.cos(np.multiply.outer(np.abs(distance), frequencies)).mean(axis=-1)


def sinusoidal_mean(position: np.ndarray, hidden_size: int) -> np.ndarray:
    """Mean over features of sqrt(2) (sin, cos)(t * 10000^(-2i/d)): not small, because slow cosines are near 1 for a whole
    sequence."""
    angle = np.multiply.outer(position, 10000.0 ** (-np.arange(0, hidden_size, 2) / hidden_size))
    return np.sqrt(0.5) * (np.sin(angle) + np.cos(angle)).mean(axis=-1)


def rotary_overlap(distance: np.ndarray, head_dim: int, base: float) -> np.ndarray:
    """rho(D) = (2/d_h) sum_i cos(D theta_i): what a rotation by D positions leaves of the overlap of two keys."""
    frequencies = base ** (-np.arange(0, head_dim, 2) / head_dim)
    return np.cos(np.multiply.outer(np.abs(distance), frequencies)).mean(axis=-1)


def cross_entropy_gradient(hidden_size: float, vocab_size: int, repeat_probability: float, correlation: float,
                           logit_variance: float = 1.0, z_loss: float = 0.0, smoothing: float = 0.0) -> tuple[float, float]:
    """(q_g, r_g) of d(sum of token losses)/dh at the head's input h, second moment 1 and token correlation r (THEORY.md, section
    7).

    With logits of variance u: q_g = (u/d) (1 - 2/V + e^u/V + u/d), r_g = (pi_2 - 2/V + e^{ru}/V + ru/d) / (1 - 2/V + e^u/V +
    u/d).
    """
    same, other = cross_entropy_overlaps(hidden_size, vocab_size, repeat_probability, correlation, logit_variance, z_loss, smoothing)
    return logit_variance / hidden_size * same, min(1.0, max(0.0, other / same))


def cross_entropy_overlaps(hidden_size: float, vocab_size: int, repeat_probability: float, correlation: float,
                           logit_variance: float = 1.0, z_loss: float = 0.0, smoothing: float = 0.0) -> tuple[float, float]:
    """(second moment, overlap of two tokens) of the same gradient in units of u/d.

    The parts u/d and ru/d lie along h itself; a norm that makes h takes them away, so below it d is infinite here. z-loss adds
    2 z Z p to p - e_label, Z = logsumexp of the logits = ln V + u/2: every p counts a = 1 + 2 z Z times. Smoothing e puts
    (1-e) e_label + e/V in the place of e_label.
    """
    u, size = logit_variance, float(vocab_size)
    # For u > ln V the softmax is one-hot and e^u/V, an expansion for a flat one, would run away; sum p^2 never exceeds 1.
    a = 1.0 + 2.0 * z_loss * (math.log(size) + 0.5 * u)
    label = 1.0 - smoothing
    # What the constant e/V adds, with itself and with the two others.
    flat = (smoothing ** 2 - 2.0 * a * smoothing + 2.0 * smoothing * label) / size
    same = label ** 2 - 2.0 * a * label / size + flat + a * a * (math.exp(min(u, math.log(size))) / size + min(u / hidden_size, 1.0))
    other = label ** 2 * repeat_probability - 2.0 * a * label / size + flat + a * a * (
        math.exp(min(correlation * u, math.log(size))) / size + min(correlation * u / hidden_size, 1.0))
    return same, other
