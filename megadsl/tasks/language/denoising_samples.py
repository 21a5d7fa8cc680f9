"""An encoder-decoder's objectives: T5's span corruption (arXiv 1910.10683) and BART's infilling (arXiv 1910.13461, 2.2).

Our own over GPTDataset's windows, because megatron's T5MaskedWordPieceDataset shares the WordPiece rules, sentence-wise storage
and process group of its BERT sibling (masked.py), and pads: windows cut to measure fill the source exactly.
Shape letters: n raw window, s = model.seq_length, t = model.target_length.
"""

import numpy as np

from megadsl.config.model import ModelConfig
from megadsl.data.tokenizer import Tokenizer
from megadsl.tasks.language.lengths import spans_of
from megadsl.tasks.language.options import DenoisingOptions


class SpanCorruption:
    """Window [n] -> source_tokens [s]: text with a sentinel for each span; target_tokens, labels, loss_mask [t]: the spans."""

    def __init__(self, options: DenoisingOptions, model: ModelConfig, tokenizer: Tokenizer):
        self._spans = spans_of(model.seq_length, options.noise_density, options.mean_noise_span_length)
        self._sentinels = np.array(tokenizer.additional_special_tokens_ids[:self._spans.count], dtype=np.int64)
        self._target_length, self._tokenizer = model.target_length, tokenizer

    def __call__(self, window: np.ndarray, rng: np.random.RandomState) -> dict[str, np.ndarray]:
        spans = self._spans
        kept = _random_segments(spans.length - spans.noise, spans.count, rng)
        noise = _random_segments(spans.noise, spans.count, rng)
        # As in T5's code, text and spans alternate, text first.
        pieces = np.split(window, np.cumsum(np.stack([kept, noise], axis=1).ravel())[:-1])
        source = [part for text, sentinel in zip(pieces[::2], self._sentinels, strict=True) for part in (text, [sentinel])]
        target = [part for span, sentinel in zip(pieces[1::2], self._sentinels, strict=True) for part in ([sentinel], span)]
        eos = [self._tokenizer.eos]
        numbers = [part for number, span in enumerate(pieces[1::2], 1) for part in ([0], np.full(len(span), number))]
        return {
            "source_tokens": np.concatenate([*source, eos]),
            **_target(np.concatenate([*target, eos]), np.concatenate([*numbers, [0]]), self._target_length, self._tokenizer),
        }


class Infilling:
    """Window [s - 1] -> source_tokens [s]: text with one <mask> for each span, padded; target: the whole text."""

    def __init__(self, options: DenoisingOptions, model: ModelConfig, tokenizer: Tokenizer):
        self._density, self._mean = options.noise_density, options.mean_noise_span_length
        self._source_length, self._target_length, self._tokenizer = model.seq_length, model.target_length, tokenizer

    def __call__(self, window: np.ndarray, rng: np.random.RandomState) -> dict[str, np.ndarray]:
        eos, n = [self._tokenizer.eos], len(window)
        lengths = self._span_lengths(max(1, round(self._density * n)), rng)
        # Spans and the tokens that are kept in random order: every arrangement of the spans is equally likely.
        is_span = rng.permutation(n - lengths.sum() + len(lengths)) < len(lengths)
        advance = np.ones(len(is_span), np.int64)
        advance[is_span] = lengths
        begin = np.cumsum(advance) - advance
        source = np.where(is_span, self._tokenizer.mask, np.append(window, 0)[begin])
        source = _padded(np.append(source, eos), self._source_length, self._tokenizer)
        numbers = np.zeros(n + 1, np.int64)
        numbers[:n] = np.repeat(np.cumsum(is_span) * is_span, advance)
        segments = np.zeros(self._source_length, np.int64)
        segments[:len(is_span) + 1] = 1
        return {
            "source_tokens": source, "source_segments": segments,
            **_target(np.append(window, eos), numbers, self._target_length, self._tokenizer),
        }

    def _span_lengths(self, noise: int, rng: np.random.RandomState) -> np.ndarray:
        """Poisson lengths, 0 included, that add up to `noise` (the last one is cut); never more spans than noise tokens."""
        lengths, left = [], noise
        while left:
            lengths.append(min(rng.poisson(self._mean), left))
            left -= lengths[-1]
        lengths = np.array(lengths, np.int64)
        # A <mask> for nothing makes the source longer, and it has room for no more than the whole text's length.
        excess = max(0, len(lengths) - noise)
        return np.delete(lengths, np.flatnonzero(lengths == 0)[:excess])


def _random_segments(total: int, count: int, rng: np.random.RandomState) -> np.ndarray:
    """`total` cut into `count` lengths of at least 1, every cut equally likely: [count]."""
    cuts = 1 + np.sort(rng.permutation(total - 1)[:count - 1])
    return np.diff(np.concatenate([[0], cuts, [total]]))


def _target(labels: np.ndarray, spans: np.ndarray, length: int, tokenizer: Tokenizer) -> dict[str, np.ndarray]:
    """target_tokens (labels shifted right, bos first), labels, loss_mask and target_spans (the number, from 1, of the noise span
    that a label belongs to, else 0; evaluation counts exact spans by it), each [t]."""
    loss_mask = np.zeros(length, np.float32)
    loss_mask[:len(labels)] = 1
    return {
        "target_tokens": _padded(np.append(tokenizer.bos, labels[:-1]), length, tokenizer),
        "labels": _padded(labels, length, tokenizer), "loss_mask": loss_mask, "target_spans": np.pad(spans, (0, length - len(spans))),
    }


def _padded(tokens: np.ndarray, length: int, tokenizer: Tokenizer) -> np.ndarray:
    # A foreign tokenizer may have no padding piece (-1); what stands there is not seen, but the embedding must find it.
    return np.pad(tokens, (0, length - len(tokens)), constant_values=max(tokenizer.pad, 0))
