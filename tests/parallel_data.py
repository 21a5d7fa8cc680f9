"""A small set of parallel sentences for tests: number words in Czech and in English."""

from pathlib import Path

import numpy as np

_WORDS = {"jedna": "one", "dva": "two", "tři": "three", "čtyři": "four", "pět": "five", "šest": "six", "sedm": "seven", "osm": "eight"}


def write_parallel(folder: Path) -> Path:
    """A dataset folder of 512 training, 12 validation and 12 test sentences of 2 to 5 words."""
    from megadsl.tasks.translation.prepare import ParallelSettings, prepare_parallel

    rng, lines = np.random.RandomState(5), ["id\tsrc_text\ttgt_text\tsplit"]
    for split, count in (("train", 512), ("validation", 12), ("test", 12)):
        for index in range(count):
            said = rng.choice(list(_WORDS), rng.randint(2, 6)).tolist()
            lines.append(f"{split}-{index}\t{' '.join(said)}\t{' '.join(_WORDS[word] for word in said)}\t{split}")
    (folder / "rows.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    prepare_parallel(folder / "rows.tsv", folder / "data", ParallelSettings(vocab_size=300, model_type="bpe"))
    return folder / "data"
