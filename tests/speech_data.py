"""A small set of utterances for tests: every word of a target is a tone of its own pitch and length, in noise."""

from pathlib import Path

import numpy as np
import soundfile

RATE = 8000  # other than the features', so that every test resamples
_WORDS = ("one", "two", "three", "four", "five", "six", "seven", "eight")


def tones(words: list[int], rng: np.random.RandomState, seconds: float = 0.12) -> np.ndarray:
    """A word is a tone: [samples] fp32."""
    parts = []
    for word in words:
        time = np.arange(int(RATE * seconds * rng.uniform(0.8, 1.2))) / RATE
        parts.append(np.sin(2 * np.pi * (250.0 + 350.0 * word) * time))
    return (0.3 * np.concatenate(parts) + 0.01 * rng.standard_normal(sum(map(len, parts)))).astype(np.float32)


def write_manifest(folder: Path, counts: dict[str, int], words: tuple[int, int] = (2, 6), seed: int = 3) -> Path:
    """folder/manifest.tsv with so many utterances of `words` words by split; wav, flac and ogg."""
    rng, lines = np.random.RandomState(seed), ["id\taudio\tn_frames\ttgt_text\tsrc_text\tsplit"]
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in counts.items():
        for index in range(count):
            said = rng.randint(0, len(_WORDS), rng.randint(words[0], words[1] + 1)).tolist()
            name = f"{split}-{index}.{('wav', 'flac', 'ogg')[index % 3]}"
            samples = tones(said, rng)
            soundfile.write(folder / name, samples, RATE)
            text = " ".join(_WORDS[word] for word in said)
            lines.append(f"{split}-{index}\t{name}\t{len(samples) // 80}\t{text}\t{text[::-1]}\t{split}")
    (folder / "manifest.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder / "manifest.tsv"


def write_speech(folder: Path, train: int = 64, words: tuple[int, int] = (2, 6)) -> Path:
    """A dataset folder of such utterances."""
    from megadsl.tasks.speech.prepare import SpeechSettings, prepare_speech

    manifest = write_manifest(folder / "audio", {"train": train, "validation": 12, "test": 12}, words)
    prepare_speech(manifest, folder / "data", SpeechSettings(vocab_size=290, model_type="bpe"), workers=1)
    return folder / "data"
