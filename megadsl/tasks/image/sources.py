"""Pictures as they lie on disk: idx files, npz files, folders of classes -> rows (where, label, how to read). Without torch.

    SOURCE/train-images-idx3-ubyte[.gz] + train-labels-idx1-ubyte[.gz], t10k-...    MNIST's own form
    SOURCE.npz (or train.npz, test.npz in a folder): images + labels, x_train + y_train, train_images + train_labels, ...
    SOURCE/CLASS/*.png, or SOURCE/{train,validation,test}/CLASS/*.png               a folder a class

A file classes.txt in SOURCE names the classes of idx and npz files, one a line.
Shape letters: n images, H height, W width, c channels.
"""

import gzip
import struct
import zipfile
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megadsl.errors import UserError

PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm")
# What others call the splits.
SPLIT_NAMES = {"train": ("train", "training"), "validation": ("validation", "val", "valid", "dev"), "test": ("test", "t10k", "testing")}
_IDX_TYPES = {8: ">u1", 9: ">i1", 11: ">i2", 12: ">i4", 13: ">f4", 14: ">f8"}


class Rows(ABC):
    """The images of one split."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def where(self, index: int) -> str:
        """The file and row, as messages name them."""

    @abstractmethod
    def label(self, index: int) -> int: ...

    @abstractmethod
    def read(self, index: int) -> np.ndarray:
        """uint8 [H, W, c]; UserError where it cannot be read."""


@dataclass(frozen=True)
class Source:
    """All rows by split ("train" alone where the source has one part), and the names of the classes; None: it does not name them."""

    splits: dict[str, Rows]
    classes: tuple[str, ...] | None
    files: tuple[Path, ...]


class ArrayRows(Rows):
    """Images of an array [n, H, W] or [n, H, W, c], integers from 0 to 255 or floats from 0 to 1."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, file: Path, labels_file: Path):
        labels = labels.reshape(-1)
        if len(images) != len(labels):
            raise UserError(f"{file} holds {len(images)} images, but {labels_file} {len(labels)} labels; every image needs one.")
        if images.ndim not in (3, 4) or images.dtype.kind not in "uif":
            raise UserError(f"{file} holds an array {images.dtype} {images.shape}; images are [images, height, width] or [..., channels].")
        if labels.dtype.kind not in "ui":
            raise UserError(f"{labels_file} holds labels of type {labels.dtype}; they must be whole numbers from 0 on.")
        self._images, self._labels, self._file = images if images.ndim == 4 else images[..., None], labels, file

    def __len__(self) -> int:
        return len(self._labels)

    def where(self, index: int) -> str:
        return f"{self._file}, row {index}"

    def label(self, index: int) -> int:
        return int(self._labels[index])

    def read(self, index: int) -> np.ndarray:
        image = self._images[index]
        if image.dtype == np.uint8:
            return image
        largest = 1.0 if image.dtype.kind == "f" else 255.0
        if not np.isfinite(image).all():
            raise UserError(f"{self.where(index)}: the image has a NaN or an infinite pixel.")
        if image.size and not 0.0 <= image.min() <= image.max() <= largest:
            raise UserError(f"{self.where(index)}: pixels from {image.min():g} to {image.max():g}; they must lie from 0 to {largest:g}.")
        return np.round(image * (255.0 / largest)).astype(np.uint8)


class FileRows(Rows):
    """Pictures of a folder of class folders. `size`: the short side is scaled to it and the middle cut out."""

    def __init__(self, files: list[tuple[Path, int]], size: int | None, channels: int | None):
        self._files, self._size, self._channels = files, size, channels

    def __len__(self) -> int:
        return len(self._files)

    def where(self, index: int) -> str:
        return str(self._files[index][0])

    def label(self, index: int) -> int:
        return self._files[index][1]

    def read(self, index: int) -> np.ndarray:
        from PIL import Image, ImageOps

        path = self._files[index][0]
        try:
            with Image.open(path) as file:
                grey = file.mode in ("1", "L", "LA", "I;16")
                image = file.convert("L" if (self._channels or (1 if grey else 3)) == 1 else "RGB")
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise UserError(f"{path} cannot be read as a picture ({error}).") from error
        if self._size is not None:
            image = ImageOps.fit(image, (self._size, self._size), Image.Resampling.BICUBIC)
        pixels = np.asarray(image)
        return pixels if pixels.ndim == 3 else pixels[..., None]


def open_source(path: Path, size: int | None = None, channels: int | None = None) -> Source:
    """Find out which form `path` has.

    Raises:
        UserError: none of them, or a file that is damaged.
    """
    if path.is_file() and path.suffix == ".npz":
        return _npz([path])
    if not path.is_dir():
        raise UserError(f"{path} is no folder and no .npz file; give a folder of idx files, of .npz files or of class folders.")
    if found := sorted(path.glob("*idx[0-9]-ubyte*")):
        return _idx(path, found)
    if found := sorted(path.glob("*.npz")):
        return _npz(found)
    return _class_folders(path, size, channels)


def split_of(name: str) -> str | None:
    """The split that a file or folder name begins with."""
    return next((split for split, names in SPLIT_NAMES.items() if name.lower().startswith(names)), None)


def read_idx(path: Path) -> np.ndarray:
    """The array of an idx file (magic number: two zeros, type, dimensions; sizes as big-endian words; data)."""
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        zeros, kind, dimensions = struct.unpack(">HBB", data[:4])
        shape = struct.unpack(f">{dimensions}I", data[4:4 + 4 * dimensions])
        if zeros or kind not in _IDX_TYPES:
            raise ValueError(f"magic number {data[:4].hex()}")
        array = np.frombuffer(data, _IDX_TYPES[kind], offset=4 + 4 * dimensions)
        if array.size != np.prod(shape):
            raise ValueError(f"{array.size} numbers, its head says {int(np.prod(shape))}")
    except (OSError, EOFError, ValueError, struct.error) as error:
        raise UserError(f"{path} is no complete idx file ({error}); fetch it again.") from error
    return array.reshape(shape)


def _idx(folder: Path, files: list[Path]) -> Source:
    splits = {}
    for images in (path for path in files if "images" in path.name):
        split = split_of(images.name)
        labels = next((path for path in files if "labels" in path.name and split_of(path.name) == split), None)
        if split is None or labels is None:
            raise UserError(f"{images} has no file of labels beside it (train-labels-idx1-ubyte[.gz], t10k-labels-idx1-ubyte[.gz]).")
        splits[split] = ArrayRows(read_idx(images), read_idx(labels), images, labels)
    return _with_train(Source(splits, _class_names(folder), tuple(files)), folder)


def _npz(files: list[Path]) -> Source:
    splits = {}
    for path in files:
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise UserError(f"{path} is no npz file of plain arrays ({error}).") from error
        for split in (*SPLIT_NAMES, None):
            pair = _pair(arrays, split)
            if pair:
                splits[split or split_of(path.name) or "train"] = ArrayRows(*pair, path, path)
    return _with_train(Source(splits, _class_names(files[0].parent), tuple(files)), files[0])


def _pair(arrays: dict[str, np.ndarray], split: str | None) -> tuple[np.ndarray, np.ndarray] | None:
    """(images, labels) of a split by the names that are in use; None: of a file that holds one split."""
    for name in SPLIT_NAMES[split] if split else ("",):
        for images, labels in (("images", "labels"), ("x", "y")):
            forms = ((f"{name}_{images}", f"{name}_{labels}"), (f"{images}_{name}", f"{labels}_{name}")) if name else ((images, labels),)
            for form in forms:
                if form[0] in arrays and form[1] in arrays:
                    return arrays[form[0]], arrays[form[1]]
    return None


def _class_folders(path: Path, size: int | None, channels: int | None) -> Source:
    parts = {split_of(folder.name): folder for folder in sorted(path.iterdir()) if folder.is_dir() and folder.name.lower() in _ALL_NAMES}
    parts = parts or {"train": path}
    folders = {split: sorted(one for one in part.iterdir() if one.is_dir()) for split, part in parts.items()}
    classes = tuple(sorted({folder.name for part in folders.values() for folder in part}))
    if not classes:
        raise UserError(f"{path} holds no idx file, no .npz file and no folder of pictures; see docs/image.md for the forms.")
    splits = {}
    for split, part in folders.items():
        files = []
        for folder in part:
            found = [file for file in sorted(folder.rglob("*")) if file.suffix.lower() in PICTURES]
            if not found:
                raise UserError(f"The class folder {folder} holds no picture ({', '.join(PICTURES)}); fill it or remove it.")
            files += [(file, classes.index(folder.name)) for file in found]
        splits[split] = FileRows(files, size, channels)
    every = tuple(Path(rows.where(index)) for rows in splits.values() for index in range(len(rows)))
    return _with_train(Source(splits, classes, every), path)


_ALL_NAMES = {name for names in SPLIT_NAMES.values() for name in names}


def _class_names(folder: Path) -> tuple[str, ...] | None:
    path = folder / "classes.txt"
    if not path.is_file():
        return None
    return tuple(line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip())


def _with_train(source: Source, path: Path) -> Source:
    if not len(source.splits.get("train", ())):
        raise UserError(f"{path} holds no training images with labels; see docs/image.md for the names that are known.")
    return source
