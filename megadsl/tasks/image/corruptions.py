"""The 15 corruptions x 5 severities of ImageNet-C (Hendrycks and Dietterich, arXiv 1903.12261), made here by the package
imagecorruptions-imaug, or read from a folder DIR/corruption/severity/class/picture.

The severities are those for pictures of 224 pixels; on small ones the same blur or noise hides more (CIFAR-10-C has milder ones). The
package refuses less than 32 pixels: such images get a border of repeated edge pixels that is cut off again. Grey images go in as three
alike channels, of which the first comes back.
"""

import inspect
from pathlib import Path

import numpy as np
import torch

from megadsl.data.epoch_order import evenly_spread
from megadsl.errors import UserError
from megadsl.tasks.image.prepared import Images, ImageSet
from megadsl.tasks.image.samples import PlainImages
from megadsl.tasks.image.sources import PICTURES, FileRows

SEVERITIES = (1, 2, 3, 4, 5)
_SMALLEST = 32


def corruption_names() -> list[str]:
    """The 15 in the order of the paper."""
    return list(_package().get_corruption_names())


def corrupt(image: np.ndarray, name: str, severity: int, seed: int) -> np.ndarray:
    """uint8 [H, W, c], 1 or 3 channels -> the same corrupted; the random generator of numpy is left as it was."""
    package, (height, width, channels) = _package(), image.shape
    border = [((missing := max(0, _SMALLEST - side)) // 2, missing - missing // 2) for side in (height, width)]
    padded = np.pad(image, (*border, (0, 0)), mode="edge")
    # The package draws from numpy's own generator, and from a compiled one that it is handed a seed for.
    own_seed = "seed" in inspect.signature(package.corruption_dict[name]).parameters
    state = np.random.get_state()
    np.random.seed(seed)
    try:
        found = package.corrupt(np.ascontiguousarray(padded), severity=severity, corruption_name=name, **({"seed": seed} if own_seed else {}))
    finally:
        np.random.set_state(state)
    return found[border[0][0]:border[0][0] + height, border[1][0]:border[1][0] + width, :channels]


class CorruptedImages(torch.utils.data.Dataset):
    """A split with one corruption; image i is corrupted alike for every model."""

    def __init__(self, described: ImageSet, images: Images, name: str, severity: int):
        self._described, self._images, self._name, self._severity = described, images, name, severity

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        seed = (index * len(SEVERITIES) + self._severity) % 2**32
        image = corrupt(np.asarray(self._images.images[index]), self._name, self._severity, seed)
        return PlainImages(self._described, Images(image[None], self._images.labels[index:index + 1]))[0]


class _Pictures(torch.utils.data.Dataset):
    """Pictures of a folder as samples."""

    def __init__(self, described: ImageSet, rows: FileRows):
        self._described, self._rows = described, rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        one, image = self._described, self._rows.read(index)
        if image.shape != (one.height, one.width, one.channels):
            raise UserError(f"{self._rows.where(index)}: {image.shape[0]} x {image.shape[1]} pixels; the model reads {one.height} x {one.width}.")
        return PlainImages(one, Images(image[None], np.array([self._rows.label(index)])))[0]


def open_corrupted(folder: Path, described: ImageSet, count: int | None) -> dict[tuple[str, str], torch.utils.data.Dataset]:
    """(corruption, severity) -> samples of DIR/corruption/severity/class, at most `count` of each, spread over all.

    Raises:
        UserError: another layout, or a class that the model does not know.
    """
    found = {}
    for part in sorted(path for path in folder.glob("*/*") if path.is_dir() and path.name.isdigit()):
        files = []
        for inner in sorted(path for path in part.iterdir() if path.is_dir()):
            if inner.name not in described.classes:
                raise UserError(f"{inner} is no class of the model ({', '.join(described.classes[:10])}); rename the folder.")
            files += [(file, described.classes.index(inner.name)) for file in sorted(inner.iterdir()) if file.suffix.lower() in PICTURES]
        if not files:
            raise UserError(f"{part} holds no picture in folders of classes.")
        files = [files[place] for place in evenly_spread(len(files), count or len(files))]
        size = described.height if described.height == described.width else None
        found[part.parent.name, part.name] = _Pictures(described, FileRows(files, size, described.channels))
    if not found:
        raise UserError(f"{folder} holds no corrupted images; they lie in DIR/corruption/severity/class, for example fog/3/coat/1.png.")
    return found


def _package():
    try:
        import imagecorruptions
    except ImportError as error:
        raise UserError(f"--corruptions needs the package imagecorruptions-imaug: pip install 'megadsl[image]' ({error}).") from error
    return imagecorruptions
