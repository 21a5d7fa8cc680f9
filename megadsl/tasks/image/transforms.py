"""What makes a training sample of an image: random crop and flip, mixup and CutMix, smoothed labels. Without torch.

Every sample draws from a random stream of its own, so it is the same in every layout and in a resumed run.
Shape letters: H height, W width, c channels, k classes.
"""

import numpy as np

from megadsl.tasks.image.options import ImageOptions
from megadsl.tasks.image.prepared import Images, ImageSet


class Augmentation:
    """Samples of a split as training sees them: pixels fp32 [c, H, W], target fp32 [k] that sums to 1."""

    def __init__(self, options: ImageOptions, described: ImageSet, images: Images):
        self._options, self._described, self._images = options, described, images

    def sample(self, place: int, rng: np.random.RandomState) -> tuple[np.ndarray, np.ndarray]:
        """Image `place` with what `rng` makes of it."""
        options, classes = self._options, len(self._described.classes)
        pixels, target = self._cut(place, rng), one_hot(self._images.labels[place], classes)
        ways = [way for way, alpha in ((mixup, options.mixup_alpha), (cutmix, options.cutmix_alpha)) if alpha]
        if ways:
            way = ways[rng.randint(len(ways))]
            partner = rng.randint(len(self._images))
            alpha = options.mixup_alpha if way is mixup else options.cutmix_alpha
            pixels, kept = way(pixels, self._cut(partner, rng), rng.beta(alpha, alpha), rng)
            target = kept * target + (1.0 - kept) * one_hot(self._images.labels[partner], classes)
        smoothing = options.label_smoothing
        return as_channels(self._described.normalised(pixels)), ((1.0 - smoothing) * target + smoothing / classes).astype(np.float32)

    def _cut(self, place: int, rng: np.random.RandomState) -> np.ndarray:
        image = np.asarray(self._images.images[place])
        if self._options.crop_padding:
            image = random_crop(image, self._options.crop_padding, rng)
        if self._options.horizontal_flip and rng.randint(2):
            image = image[:, ::-1]
        return image


def one_hot(label: int, classes: int) -> np.ndarray:
    """[k] fp32."""
    target = np.zeros(classes, np.float32)
    target[label] = 1.0
    return target


def as_channels(pixels: np.ndarray) -> np.ndarray:
    """[H, W, c] -> [c, H, W]."""
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def random_crop(image: np.ndarray, padding: int, rng: np.random.RandomState) -> np.ndarray:
    """The image, [H, W, c], moved by up to `padding` pixels each way; what comes in is black."""
    height, width = image.shape[:2]
    top, left = rng.randint(2 * padding + 1, size=2)
    return np.pad(image, ((padding, padding), (padding, padding), (0, 0)))[top:top + height, left:left + width]


def mixup(image: np.ndarray, other: np.ndarray, share: float, rng: np.random.RandomState) -> tuple[np.ndarray, float]:
    """(blend of two images, share of the first)."""
    return share * image.astype(np.float32) + (1.0 - share) * other.astype(np.float32), share


def cutmix(image: np.ndarray, other: np.ndarray, share: float, rng: np.random.RandomState) -> tuple[np.ndarray, float]:
    """(image with a box of area 1 - share from another, share of pixels that stayed; the box is cut off at the border)."""
    height, width = image.shape[:2]
    half = 0.5 * np.sqrt(1.0 - share)
    row, column = rng.randint(height), rng.randint(width)
    top, bottom = np.clip([round(row - half * height), round(row + half * height)], 0, height)
    left, right = np.clip([round(column - half * width), round(column + half * width)], 0, width)
    pasted = image.copy()
    pasted[top:bottom, left:right] = other[top:bottom, left:right]
    return pasted, 1.0 - (bottom - top) * (right - left) / (height * width)
