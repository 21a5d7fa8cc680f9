"""A prepared folder of images: what `megadsl data images` writes and image_classification reads. Without torch.

    DIR/train.images.bin   validation.images.bin   test.images.bin    uint8 [images, height, width, channels], memory-mapped
    DIR/train.labels.bin   ...                                        int32 [images]
    DIR/images.json                                                   sizes, classes, mean and deviation, checksums; written last

Shape letters: n images, H height, W width, c channels.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from megadsl.data.atomic_files import read_json, sizes_match
from megadsl.errors import UserError

MANIFEST = "images.json"
FORMAT = 1
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class ImageSet:
    """What images.json says, in a prepared folder or beside a checkpoint.

    Attributes:
        mean, deviation: of every channel over the training split, in units of the brightest value (255).
        counts: images by split.
        sha256: of the files by name.
    """

    height: int
    width: int
    channels: int
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    deviation: tuple[float, ...]
    counts: dict[str, int]
    sha256: dict[str, str]

    @classmethod
    def load(cls, path: Path) -> "ImageSet":
        """UserError where `path` is no complete images.json."""
        values = read_json(path)
        if values is None or values.get("format") != FORMAT:
            raise UserError(f"{path.parent} holds no prepared images; make them with megadsl data images SOURCE --output {path.parent}")
        try:
            found = cls(
                *(int(values[key]) for key in ("height", "width", "channels")), tuple(map(str, values["classes"])),
                tuple(map(float, values["mean"])), tuple(map(float, values["deviation"])),
                {split: int(values["splits"][split]) for split in SPLITS}, dict(values["sha256"]))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{path} is damaged ({error!r}); make it again with megadsl data images.") from error
        if len(found.mean) != found.channels or len(found.deviation) != found.channels or not all(value > 0 for value in found.deviation):
            raise UserError(f"{path} is damaged (mean and deviation of {found.channels} channels); make it again with megadsl data images.")
        return found

    def normalised(self, images: np.ndarray) -> np.ndarray:
        """Pixels [..., H, W, c] from 0 to 255 -> fp32 of mean 0 and variance 1 over the training split."""
        scale = 1.0 / (255.0 * np.array(self.deviation))
        return images.astype(np.float32) * scale.astype(np.float32) - (np.array(self.mean) / self.deviation).astype(np.float32)


@dataclass(frozen=True)
class Images:
    """One split, memory-mapped: images uint8 [n, H, W, c], labels int32 [n]."""

    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)


class Prepared:
    """A complete prepared folder; UserError where it is missing or damaged."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.described = ImageSet.load(folder / MANIFEST)
        sizes = (read_json(folder / MANIFEST) or {}).get("file_bytes")
        if not isinstance(sizes, dict) or not sizes_match(folder, sizes) or set(sizes) != set(self.described.sha256):
            raise UserError(f"The images in {folder} are damaged (a file is missing or cut short); make them again with megadsl data images.")

    def split(self, name: str) -> Images:
        """"train", "validation" or "test"."""
        one = self.described
        shape = (one.counts[name], one.height, one.width, one.channels)
        try:
            images = _mapped(self.folder / f"{name}.images.bin", np.uint8, shape)
            labels = _mapped(self.folder / f"{name}.labels.bin", np.dtype("<i4"), shape[:1])
        except (OSError, ValueError) as error:
            raise UserError(f"{self.folder / name} cannot be read ({error}); make the images again with megadsl data images.") from error
        return Images(images, labels)

    @cached_property
    def train(self) -> Images:
        return self.split("train")


def _mapped(path: Path, dtype: np.dtype | type, shape: tuple[int, ...]) -> np.ndarray:
    # An empty file cannot be mapped.
    return np.memmap(path, dtype, "r", shape=shape) if shape[0] else np.zeros(shape, dtype)
