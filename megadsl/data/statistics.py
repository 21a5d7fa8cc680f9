"""Token statistics of a dataset: what the theory needs of the input (repeated tokens) and what a model must beat (entropy).

p_i is the frequency of token i in the train split; all logarithms are natural. Shape letters: n sequences, s positions.
"""

from pathlib import Path

import numpy as np

from megadsl.data.dataset import STATISTICS, TOKENIZER, Window, load_dataset
from megadsl.data.atomic_files import write_json
from megadsl.data.tokenizer import Tokenizer

DEFAULT_SEQ_LENGTH = 128
_SAMPLED_SEQUENCES = 2048
_SAMPLED_TOKENS = 4_000_000
_CHUNK = 1 << 22


def write_statistics(folder: Path, seq_length: int = DEFAULT_SEQ_LENGTH) -> dict:
    """Compute the statistics of a complete dataset folder and write its stats.json."""
    statistics = token_statistics(folder, load_dataset(folder), seq_length)
    write_json(folder / STATISTICS, statistics)
    return statistics


def token_statistics(folder: Path, manifest: dict, seq_length: int) -> dict:
    """The numbers of stats.json. A split that is too short for a number gives null there."""
    train, validation = (_counts(folder, manifest, split) for split in ("train", "validation"))
    p = train / train.sum()
    seen = p[p > 0]
    # One more of every token than was seen: a validation token that is not in the train split must not cost infinitely much.
    smoothed = (train + 1) / (train.sum() + len(train))
    cross_entropy = float(-validation @ np.log(smoothed) / validation.sum()) if validation.any() else None
    return {
        "vocab_size": manifest["vocab_size"],
        "num_tokens": int(train.sum()),
        "repeat_probability": float(np.sum(p**2)),
        "repeat_probability_in_sequence": _repeats(folder, manifest, seq_length),
        "seq_length": seq_length,
        "unigram_entropy": float(-np.sum(seen * np.log(seen))),
        "validation_unigram_cross_entropy": cross_entropy,
        "bytes_per_token": manifest["splits"]["train"]["text_bytes"] / int(train.sum()),
    }


def repeat_probability(sequences: np.ndarray) -> float:
    """Probability that two different positions of one sequence hold the same token; sequences: [n, s], s >= 2."""
    ordered = np.sort(sequences, axis=1)
    starts = np.ones(ordered.shape, dtype=bool)
    starts[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    runs = np.diff(np.append(np.flatnonzero(starts), ordered.size)).astype(np.float64)
    n, s = sequences.shape
    return float(np.sum(runs * (runs - 1)) / (n * s * (s - 1)))


def _counts(folder: Path, manifest: dict, split: str) -> np.ndarray:
    """How often each id occurs in a split: [vocabulary]."""
    counts = np.zeros(manifest["vocab_size"], dtype=np.int64)
    if manifest["splits"][split]["tokens"]:
        ids = np.memmap(folder / f"{split}.bin", dtype=manifest["dtype"], mode="r")
        for start in range(0, len(ids), _CHUNK):
            counts += np.bincount(ids[start:start + _CHUNK], minlength=len(counts))
    return counts


def _repeats(folder: Path, manifest: dict, seq_length: int) -> float | None:
    """`repeat_probability` of raw training sequences, document boundaries included."""
    if seq_length < 2 or manifest["splits"]["train"]["tokens"] <= seq_length:
        return None
    # Imported here: Megatron takes 4 s, and a mistake in the command shall not wait for it.
    from megadsl.data.windows import Windows

    # With the overlap of a causal sample, whatever objective will read the dataset.
    window = Window(seq_length, overlap=1)
    sequences = Windows(folder, manifest, "train", window, seed=0, tokenizer=Tokenizer.load(folder / TOKENIZER), cached=False)
    most = max(1, min(_SAMPLED_SEQUENCES, _SAMPLED_TOKENS // seq_length))
    # The samples are in random order, so the first ones are a random draw.
    return repeat_probability(np.stack([sequences[i]["window"][:-1] for i in range(min(most, sequences.samples_per_epoch))]))
