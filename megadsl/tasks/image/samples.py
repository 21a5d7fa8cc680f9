"""Samples of image_classification: sample i of a split is a pure function of (training.seed, i), whatever the layout.

Shape letters: c channels, H height, W width, k classes.
"""

from functools import cached_property

import numpy as np
import torch

from megadsl.data.epoch_order import EpochOrder
from megadsl.tasks.image.options import ImageOptions
from megadsl.tasks.image.prepared import Images, ImageSet, Prepared
from megadsl.tasks.image.transforms import Augmentation, as_channels, one_hot
from megadsl.tasks.task import Splits


class TrainingImages(torch.utils.data.Dataset):
    """Endless: sample i is number i mod n of its epoch's permutation, augmented anew whenever it comes again."""

    def __init__(self, options: ImageOptions, described: ImageSet, images: Images, seed: int):
        self._augmentation, self._images, self._seed = Augmentation(options, described, images), images, seed % 2**32
        self._order = EpochOrder(len(images), seed)

    def __len__(self) -> int:
        return 2**40

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        index = int(index)
        place = self._order[index]
        # Three words, so that this is no stream of the permutations.
        pixels, target = self._augmentation.sample(place, np.random.RandomState([self._seed, index % 2**32, index >> 32]))
        return _tensors(pixels, target, int(self._images.labels[place]))


class PlainImages(torch.utils.data.Dataset):
    """The images of a split in order, as they are."""

    def __init__(self, described: ImageSet, images: Images):
        self._described, self._images = described, images

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        label = int(self._images.labels[index])
        pixels = as_channels(self._described.normalised(np.asarray(self._images.images[index])))
        return _tensors(pixels, one_hot(label, len(self._described.classes)), label)


def _tensors(pixels: np.ndarray, target: np.ndarray, label: int) -> dict[str, torch.Tensor]:
    """"pixel_values" fp32 [c, H, W], "target" fp32 [k] of sum 1, "label": the image's own, whatever was blended in."""
    return {"pixel_values": torch.from_numpy(pixels), "target": torch.from_numpy(target), "label": torch.tensor(label)}


class ImageSplits(Splits):
    """The splits of a run; each is opened when it is first asked for."""

    def __init__(self, prepared: Prepared, described: ImageSet, options: ImageOptions, seed: int):
        self._prepared, self._described, self._options, self._seed = prepared, described, options, seed

    @cached_property
    def train(self) -> TrainingImages:
        return TrainingImages(self._options, self._described, self._prepared.train, self._seed)

    @cached_property
    def validation(self) -> PlainImages:
        return PlainImages(self._described, self._prepared.split("validation"))

    @cached_property
    def test(self) -> PlainImages:
        return PlainImages(self._described, self._prepared.split("test"))
