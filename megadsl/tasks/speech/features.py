"""Log-mel filter banks of an audio file: 80 bins, windows of 25 ms every 10 ms, per-utterance mean and variance (fairseq's recipe).

Shape letters: n frames.
"""

from math import gcd
from pathlib import Path

import numpy as np

from megadsl.errors import UserError

SAMPLE_RATE = 16000
NUM_BINS = 80
FRAMES_PER_SECOND = 100
# A bin that hardly moves (digital silence) is not blown up to unit variance.
_SMALLEST_DEVIATION = 1e-2


class UnusableAudio(Exception):
    """Why an audio file gives no features: `reason` continues the sentence "FILE, row N ...", `detail` says it of this file."""

    def __init__(self, reason: str, detail: object):
        super().__init__(f"{reason} ({detail})")
        self.reason, self.detail = reason, str(detail)


def require_packages() -> None:
    """UserError where a package that reads audio is missing."""
    for module, package in (("soundfile", "soundfile"), ("kaldi_native_fbank", "kaldi-native-fbank")):
        try:
            __import__(module)
        except ImportError as error:
            raise UserError(f"Speech needs the package {package}: pip install 'megadsl[speech]'.") from error


def waveform(path: Path) -> np.ndarray:
    """Samples of an audio file (wav, flac, ogg, ...) at 16 kHz, channels averaged: [samples] fp32; UnusableAudio where there is none."""
    import soundfile
    from scipy.signal import resample_poly

    if not path.is_file():
        raise UnusableAudio("names an audio file that does not exist", path)
    try:
        samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    except (soundfile.LibsndfileError, OSError) as error:
        raise UnusableAudio("names a file that is no audio", f"{path}: {error}") from error
    mono = samples.mean(axis=1)
    if not mono.size:
        raise UnusableAudio("names an audio file without samples", path)
    if not np.isfinite(mono).all():
        raise UnusableAudio("names audio whose samples are not finite numbers (NaN)", path)
    if rate != SAMPLE_RATE:
        divisor = gcd(rate, SAMPLE_RATE)
        mono = resample_poly(mono, SAMPLE_RATE // divisor, rate // divisor).astype(np.float32)
    return mono


def filter_banks(samples: np.ndarray) -> np.ndarray:
    """[samples] at 16 kHz -> log-mel energies as Kaldi computes them, [n, 80] fp32; no frame for less than 25 ms."""
    import kaldi_native_fbank

    options = kaldi_native_fbank.FbankOptions()
    options.frame_opts.samp_freq, options.frame_opts.dither = SAMPLE_RATE, 0.0
    options.mel_opts.num_bins = NUM_BINS
    fbank = kaldi_native_fbank.OnlineFbank(options)
    fbank.accept_waveform(SAMPLE_RATE, (samples * 32768.0).tolist())  # Kaldi's scale is that of 16-bit samples
    fbank.input_finished()
    frames = [fbank.get_frame(index) for index in range(fbank.num_frames_ready)]
    return np.stack(frames) if frames else np.zeros((0, NUM_BINS), np.float32)


def normalised(frames: np.ndarray) -> np.ndarray:
    """Mean 0 and variance 1 of every bin over the utterance: [n, 80]."""
    deviation = frames.std(axis=0)
    return (frames - frames.mean(axis=0)) / np.maximum(deviation, _SMALLEST_DEVIATION)


def utterance_features(path: Path, min_frames: int, max_frames: int) -> np.ndarray:
    """Normalised filter banks of a file, [n, 80] fp16; UnusableAudio where they cannot be used."""
    frames = filter_banks(waveform(path))
    if len(frames) < min_frames:
        raise UnusableAudio("names an utterance that is too short", f"{path}: {len(frames)} frames of 10 ms, --min-frames {min_frames}")
    if len(frames) > max_frames:
        raise UnusableAudio("names an utterance that is too long", f"{path}: {len(frames)} frames of 10 ms, --max-frames {max_frames}")
    features = normalised(frames)
    if not np.isfinite(features).all():
        raise UnusableAudio("names audio whose features are not finite numbers (NaN)", path)
    return features.astype(np.float16)
