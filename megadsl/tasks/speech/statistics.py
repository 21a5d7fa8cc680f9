"""What enters the trunk: second moment and overlap of the front end's positions, from measured frames and the kernel of its layers.

For random weights the Gram matrix of a layer's output follows from that of its input. With X [n, 80] the frames of an utterance
(zeros beyond its ends) and G = X X^T, positions i, j
    convolution   U_ij = s^2 sum_k G[2i+k, 2j+k], k = 0..4       (pre-activations, one channel)
    ReLU          H_ij = sqrt(U_ii U_jj) [sqrt(1-c^2) + c (pi - arccos c)] / (2 pi), c = U_ij / sqrt(U_ii U_jj)   (arc-cosine kernel of
                  arXiv 1112.3712; exact for whatever energies the two positions have)
    convolution   K_ij = C s'^2 sum_k H[2i+k, 2j+k]
so neighbours, which share 3 of 5 frames and resemble each other anyhow, overlap strongly. What is approximated: C channels are
taken for infinitely many (the kernel fluctuates by 1/sqrt(C)), and the trunk is given the mean over all pairs of an utterance.
"""

from dataclasses import dataclass

import numpy as np

STRIDE = 4
KERNEL, HOP, EDGE = 5, 2, 2
SHARES = 32  # of the positions, by energy


@dataclass(frozen=True)
class FrontEnd:
    """Moments of what the last matrix of the front end reads, as the plan needs them.

    Attributes:
        size: its inputs.
        second_moment: per input, so that std^2 size second_moment is that of its output.
        overlap: of two positions of an utterance over the second moment.
        spread: second moments of equal shares of the positions over their mean, ascending (TokenStatistics.spread).
        inner_std: of the first convolution's weights, which gives its pre-activations second moment 1; None: there is none.
        utterances: measured.
    """

    size: int
    second_moment: float
    overlap: float
    spread: tuple[float, ...]
    inner_std: float | None
    utterances: int


def front_end_moments(utterances: list[np.ndarray], kind: str, channels: int) -> FrontEnd:
    """`kind`: convolution or stacking; utterances [n, bins]."""
    bins = utterances[0].shape[1]
    if kind == "stacking":
        size, inner = STRIDE * bins, None
        grams = [_stacked(frames) for frames in utterances]
    else:
        inputs = [_convolved(_gram(frames)) for frames in utterances]
        mean = sum(np.trace(gram) for gram in inputs) / sum(len(gram) for gram in inputs)
        size, inner = KERNEL * channels, float(mean ** -0.5)
        grams = [channels * _convolved(relu_overlap(gram / mean)) for gram in inputs]
    squares = sum(np.trace(gram) for gram in grams)
    positions = sum(len(gram) for gram in grams)
    pairs = sum(len(gram) * (len(gram) - 1) for gram in grams)
    second = squares / positions
    overlap = (sum(float(gram.sum()) for gram in grams) - squares) / max(pairs, 1)
    energies = np.sort(np.concatenate([np.diag(gram) for gram in grams])) / second
    spread = tuple(float(part.mean()) for part in np.array_split(energies, min(SHARES, len(energies))))
    return FrontEnd(size, float(second / size), float(overlap / second), spread, inner, len(utterances))


def relu_overlap(gram: np.ndarray) -> np.ndarray:
    """E relu(x_i) relu(x_j) for Gaussians of this covariance, [n, n]."""
    root = np.sqrt(np.maximum(np.diag(gram), 0.0))
    both = np.outer(root, root)
    cosine = np.clip(np.divide(gram, both, out=np.zeros_like(gram), where=both > 0), -1.0, 1.0)
    return both * (np.sqrt(1.0 - cosine ** 2) + cosine * (np.pi - np.arccos(cosine))) / (2.0 * np.pi)


def _gram(frames: np.ndarray) -> np.ndarray:
    frames = frames.astype(np.float64)
    return frames @ frames.T


def _convolved(gram: np.ndarray) -> np.ndarray:
    """[n, n] -> Gram matrix of a convolution of stride 2 with weights of variance 1 a channel, [ceil(n/2), ceil(n/2)]."""
    size = -(-len(gram) // HOP)
    padded = np.pad(gram, (EDGE, EDGE + 1))
    return sum(padded[k:k + HOP * size:HOP, k:k + HOP * size:HOP] for k in range(KERNEL))


def _stacked(frames: np.ndarray) -> np.ndarray:
    short = -len(frames) % STRIDE
    return _gram(np.pad(frames, ((0, short), (0, 0))).reshape(-1, STRIDE * frames.shape[1]))
