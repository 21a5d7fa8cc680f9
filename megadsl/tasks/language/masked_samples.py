"""An encoder's objective: BERT's masked tokens (arXiv 1810.04805), chosen anew for every sample, and ALBERT's sentence order
(arXiv 1909.11942). Our own over GPTDataset's windows, because megatron's BERTMaskedWordPieceDataset tells words by WordPiece's
"##", wants documents stored as one sequence a sentence, needs a process group even alone (masked_dataset.py: get_rank without
a check) and writes its index into a cache folder.

Shape letters: s = model.seq_length, n text tokens of a window.
"""

import unicodedata

import numpy as np
import torch

from megadsl.data.epoch_order import evenly_spread
from megadsl.data.tokenizer import Tokenizer
from megadsl.tasks.language.causal_samples import segments_of
from megadsl.tasks.language.options import MaskedOptions
from megadsl.tasks.language.samples import StreamSamples

_MASKED, _RANDOM = 0.8, 0.1


class Masked:
    """Window [n] -> tokens, labels, loss_mask [s] of [CLS] text [SEP], or of [CLS] A [SEP] B [SEP] with sentence_order."""

    def __init__(self, options: MaskedOptions, tokenizer: Tokenizer):
        self._options, self._tokenizer = options, tokenizer
        self._is_text = tokenizer.is_text
        self._text_ids = np.flatnonzero(tokenizer.is_text)
        self._starts, self._alone, self._line_end = piece_classes(tokenizer)

    def __call__(self, window: np.ndarray, rng: np.random.RandomState) -> dict[str, np.ndarray]:
        cls, sep = [self._tokenizer.cls], [self._tokenizer.sep]
        if self._options.sentence_order:
            cut, swapped = self._cut(window, rng), rng.randint(2)
            first, second = (window[cut:], window[:cut]) if swapped else (window[:cut], window[cut:])
            labels = np.concatenate([cls, first, sep, second, sep])
            tokentypes = np.repeat([0, 1], [len(first) + 2, len(second) + 1])
        else:
            swapped, labels = 0, np.concatenate([cls, window, sep])
            tokentypes = np.zeros(len(labels), np.int64)
        tokens, loss_mask = self._mask(labels, rng)
        segments = segments_of(window, self._tokenizer.eod)
        return {
            "tokens": tokens, "labels": labels, "loss_mask": loss_mask, "tokentypes": tokentypes,
            "sentence_order": np.int64(swapped), "segments": np.concatenate([[1], segments, segments[-1:]]),
        }

    def _mask(self, labels: np.ndarray, rng: np.random.RandomState) -> tuple[np.ndarray, np.ndarray]:
        """(tokens that the encoder reads, loss_mask), each [s]."""
        candidates = np.flatnonzero(self._is_text[labels])
        wanted = max(1, round(self._options.masking_probability * len(candidates)))
        if self._options.masking_do_full_word:
            chosen = self._whole_words(labels, candidates, wanted, rng)
        else:
            chosen = rng.permutation(candidates)[:wanted]
        fate, drawn = rng.random_sample(len(chosen)), self._text_ids[rng.randint(len(self._text_ids), size=len(chosen))]
        tokens, loss_mask = labels.copy(), np.zeros(len(labels), np.float32)
        unchanged = np.where(fate < _MASKED + _RANDOM, drawn, labels[chosen])
        tokens[chosen] = np.where(fate < _MASKED, self._tokenizer.mask, unchanged)
        loss_mask[chosen] = 1
        return tokens, loss_mask

    def _whole_words(self, labels: np.ndarray, candidates: np.ndarray, wanted: int, rng: np.random.RandomState) -> np.ndarray:
        """Positions of random whole words, at most `wanted` in sum unless even the shortest word is longer."""
        words = np.split(candidates, np.flatnonzero(self._word_starts(labels)[candidates])[1:])
        chosen, left = [], wanted
        for index in rng.permutation(len(words)):
            if len(words[index]) <= left:
                chosen.append(words[index])
                left -= len(words[index])
            if not left:
                break
        return np.concatenate(chosen) if chosen else min(words, key=len)

    def _word_starts(self, tokens: np.ndarray) -> np.ndarray:
        """Where a word begins: at its own first piece, and after a piece that is a word alone or no text: [s] bool."""
        starts = self._starts[tokens] | self._alone[tokens]
        starts[0] = True
        starts[1:] |= (self._alone | ~self._is_text)[tokens[:-1]]
        return starts

    def _cut(self, window: np.ndarray, rng: np.random.RandomState) -> int:
        """Where the window is cut in two: in its middle half, after a line end, else between words, else anywhere."""
        low = max(1, len(window) // 4)
        inside = np.arange(low, max(low + 1, len(window) - low + 1))
        # A cut within a word or a line would give the order away.
        for places in (inside[self._line_end[window[inside - 1]]], inside[self._word_starts(window)[inside]], inside):
            if len(places):
                return int(places[rng.randint(len(places))])
        raise ValueError(f"a window of {len(window)} tokens cannot be cut in two")


def piece_classes(tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """By id, [vocabulary] bool: a word starts at it (U+2581); it is a word alone (indentation, punctuation); a line ends with it.

    As BERT's own pre-tokenizer does, punctuation stands alone, for in source code nothing else parts the words of a line. The
    underscore belongs to its word, and so do byte pieces beyond ASCII, which are parts of a character, and a single space, which
    SentencePiece puts before the pieces of a rare word.
    """
    texts = tokenizer.texts_of_pieces
    starts = np.array([text.startswith(" ") for text in texts])
    alone = np.array([text not in ("", " ") and all(map(_separates, text)) for text in texts])
    line_end = np.array([text.endswith("\n") for text in texts])
    return starts, alone, line_end


def _separates(character: str) -> bool:
    return character != "_" and unicodedata.category(character)[0] in "PSZC"


class OneMasked(torch.utils.data.Dataset):
    """Samples of pseudo-perplexity: text tokens of windows spread over a text, each masked alone and predicted.

    Args:
        tokens: [t] int64.
        objective: gives the sequence around a window.
        length: tokens of a window.
        count: samples, if the text has so many.
    """

    def __init__(self, tokens: np.ndarray, objective: Masked, length: int, tokenizer: Tokenizer, count: int):
        self._samples, self._mask = StreamSamples(tokens, objective, length), tokenizer.mask
        self._places: list[tuple[int, int]] = []
        for window in evenly_spread(len(self._samples), max(1, -(-count // length))):
            labels = self._samples[window]["labels"].numpy()
            self._places += [(window, int(position)) for position in np.flatnonzero(tokenizer.is_text[labels])]
        self._places = self._places[:count]

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        window, position = self._places[index]
        sample = dict(self._samples[window])
        sample["tokens"] = sample["labels"].clone()
        sample["tokens"][position] = self._mask
        sample["loss_mask"] = torch.zeros_like(sample["loss_mask"])
        sample["loss_mask"][position] = 1
        return sample
