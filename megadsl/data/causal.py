"""A decoder's objective: predict the next token, over packed documents if asked for, or after a prefix (prefix LM, as in
arXiv 1910.10683). Our own few lines over GPTDataset's windows: its attention masks are [s, s] a sample; segments say the same.

Shape letters: s = model.seq_length.
"""

import numpy as np

from megadsl.config import Config
from megadsl.data.tokenizer import Tokenizer


class Causal:
    """Window [s + 1] -> tokens, labels, loss_mask [s], and as the config asks segments [s] and prefix_length []."""

    def __init__(self, config: Config, tokenizer: Tokenizer):
        self._data, self._eod = config.data, tokenizer.eod

    def __call__(self, window: np.ndarray, rng: np.random.RandomState) -> dict[str, np.ndarray]:
        tokens, labels = window[:-1], window[1:]
        # Uniform in [1, s - 1]; drawn only where it is asked for, because nothing else here is random.
        prefix = rng.randint(1, len(tokens)) if self._data.prefix_lm else 1
        loss_mask = np.ones(len(tokens), np.float32)
        loss_mask[:prefix - 1] = 0
        if self._data.eod_mask_loss:
            loss_mask[tokens == self._eod] = 0
        return {
            "tokens": tokens, "labels": labels, "loss_mask": loss_mask, "prefix_length": np.int64(prefix),
            "segments": segments_of(tokens, self._eod),
        }


def segments_of(tokens: np.ndarray, eod: int) -> np.ndarray:
    """The number of every token's document in its sequence, from 1 on; an eod belongs to the document it ends: [s] -> [s]."""
    ends = tokens == eod
    return 1 + np.cumsum(ends) - ends
