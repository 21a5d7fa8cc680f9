"""A decoder's objective: predict the next token, over packed documents if asked for, or after a prefix (prefix LM, as in
arXiv 1910.10683). Our own few lines over GPTDataset's windows: its attention masks are [s, s] a sample; segments say the same.

Shape letters: s = model.seq_length.
"""

import numpy as np
import torch

from megadsl.data.tokenizer import Tokenizer
from megadsl.tasks.language.options import CausalOptions


class Causal:
    """Window [s + 1] -> tokens, labels, loss_mask [s], and as the config asks segments [s] and prefix_length []."""

    def __init__(self, options: CausalOptions, tokenizer: Tokenizer):
        self._options, self._eod = options, tokenizer.eod

    def __call__(self, window: np.ndarray, rng: np.random.RandomState) -> dict[str, np.ndarray]:
        tokens, labels = window[:-1], window[1:]
        # Uniform in [1, s - 1]; drawn only where it is asked for, because nothing else here is random.
        prefix = rng.randint(1, len(tokens)) if self._options.prefix_lm else 1
        loss_mask = np.ones(len(tokens), np.float32)
        loss_mask[:prefix - 1] = 0
        if self._options.eod_mask_loss:
            loss_mask[tokens == self._eod] = 0
        return {
            "tokens": tokens, "labels": labels, "loss_mask": loss_mask, "prefix_length": np.int64(prefix),
            "segments": segments_of(tokens, self._eod),
        }


def segments_of(tokens: np.ndarray, eod: int) -> np.ndarray:
    """The number of every token's document in its sequence, from 1 on; an eod belongs to the document it ends: [s] -> [s]."""
    ends = tokens == eod
    return 1 + np.cumsum(ends) - ends


class TextWindows(torch.utils.data.Dataset):
    """All of a text as samples: windows of s tokens that do not overlap; every token is a label once, the first one after an
    end-of-document; the last window is padded. Documents are numbered as in training, and there is no prefix.

    Args:
        tokens: [t] int64.
    """

    def __init__(self, tokens: np.ndarray, eod: int, seq_length: int):
        self._eod, self._length = eod, seq_length
        self._count = -(-tokens.size // seq_length)
        padding = np.full(self._count * seq_length - tokens.size, eod, dtype=np.int64)
        self._stream = np.concatenate([[eod], tokens, padding])
        self._tokens = tokens.size

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        start, length = index * self._length, self._length
        tokens = self._stream[start:start + length]
        loss_mask = (np.arange(start, start + length) < self._tokens).astype(np.float32)
        arrays = {
            "tokens": tokens, "labels": self._stream[start + 1:start + length + 1], "loss_mask": loss_mask,
            "segments": segments_of(tokens, self._eod), "prefix_length": np.int64(0),
        }
        return {name: torch.as_tensor(array) for name, array in arrays.items()}
