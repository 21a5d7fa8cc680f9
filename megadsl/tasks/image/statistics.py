"""What the theory starts from: second moments and overlaps of patches, measured on training samples as the model sees them.

A patch p_t of P pixels becomes W p_t with random W, so two of them overlap by sigma^2 P E[p_t . p_t' / P]: the mean over images of the
patches' own overlaps, position by position. Neighbours resemble each other, borders are dark: no two positions are alike, so the
whole matrix is kept. What is approximated: every image is given the mean image's overlaps (a norm divides each image by its own),
and pixels count as they are, whatever they show. A class token is drawn with the patches' mean second moment and overlaps with none
of them. Without torch. Shape letters: K images, n positions, P pixels of a patch times channels, H height, W width, c channels.
"""

import numpy as np

from megadsl.theory.inputs import TokenStatistics
from megadsl.theory.shape import PositionMoments


def patches_of(pixels: np.ndarray, size: int) -> np.ndarray:
    """[K, c, H, W] -> [K, n, P], row by row; a patch's channels come one after the other, as in a convolution's weight."""
    count, channels, height, width = pixels.shape
    cut = pixels.reshape(count, channels, height // size, size, width // size, size)
    return cut.transpose(0, 2, 4, 1, 3, 5).reshape(count, (height // size) * (width // size), channels * size * size)


def patch_statistics(patches: np.ndarray, num_classes: int, class_token: bool, waves: np.ndarray | None) -> TokenStatistics:
    """Of patches [K, n, P]; `waves`: fixed positions of the tokens, if any."""
    size = patches.shape[2]
    overlaps = np.einsum("ktp,ksp->ts", patches, patches, dtype=np.float64, optimize=True) / (len(patches) * size)
    second = float(np.diagonal(overlaps).mean())
    content = overlaps / second
    if class_token:
        content = np.pad(content, ((1, 0), (1, 0)))
        content[0, 0] = 1.0
    n = len(content)
    mean_overlap = float((content.sum() - np.trace(content)) / max(1, n * (n - 1)))
    return TokenStatistics(
        num_classes, mean_overlap, num_tokens=patches.shape[0] * n, projected_size=size, projected_second_moment=second,
        gradient_correlation=0.0 if class_token else 1.0, positions=PositionMoments(content, waves), read_position=0 if class_token else None,
        class_token=class_token,
    )
