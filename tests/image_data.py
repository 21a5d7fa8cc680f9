"""Small pictures with a class that can be learnt, in every form that `megadsl data images` reads, and configs on them.

A class is a bright bar in its own place; neighbouring pixels resemble each other, as in pictures.
"""

import gzip
import struct
from pathlib import Path

import numpy as np

from megadsl.config import Config
from megadsl.config.load import parse_config
from megadsl.tasks.image.prepare import Preparation, prepare_images

SIZE, CLASSES = 12, 4


def pictures(count: int, seed: int = 0, channels: int = 1, size: int = SIZE) -> tuple[np.ndarray, np.ndarray]:
    """(uint8 [count, size, size, channels], labels)."""
    rng = np.random.RandomState(seed)
    labels = rng.randint(0, CLASSES, count)
    noise = rng.standard_normal((count, size, size, channels))
    smooth = noise + np.roll(noise, 1, axis=1) + np.roll(noise, 1, axis=2)
    images = 60.0 + 25.0 * smooth
    for image, label in zip(images, labels, strict=True):
        start = int(label) * size // CLASSES
        image[start:start + size // CLASSES] += 110.0
    return np.clip(images, 0, 255).astype(np.uint8), labels.astype(np.uint8)


def write_idx(path: Path, array: np.ndarray) -> Path:
    """An idx file of bytes, packed where the name says so."""
    data = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(data, 1) if path.suffix == ".gz" else data)
    return path


def write_idx_folder(folder: Path, train: int = 240, test: int = 60, **shape) -> Path:
    """MNIST's four files."""
    folder.mkdir(parents=True)
    for split, count, seed in (("train", train, 0), ("t10k", test, 1)):
        images, labels = pictures(count, seed, **shape)
        write_idx(folder / f"{split}-images-idx3-ubyte.gz", images[..., 0])
        write_idx(folder / f"{split}-labels-idx1-ubyte", labels)
    return folder


def write_class_folders(folder: Path, count: int = 24, channels: int = 3, size: int = SIZE) -> Path:
    """Pictures as PNG, a folder a class."""
    from PIL import Image

    images, labels = pictures(count, channels=channels, size=size)
    for index, (image, label) in enumerate(zip(images, labels, strict=True)):
        path = folder / f"class-{label}" / f"{index:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image if channels == 3 else image[..., 0]).save(path)
    return folder


def prepared(folder: Path, **shape) -> Path:
    """A prepared folder: 216 training, 24 validation, 60 test images."""
    prepare_images(write_idx_folder(folder / "source", **shape), folder / "images", Preparation())
    return folder / "images"


def image_config(images: Path, run_dir: Path, **sections: dict) -> Config:
    """4 layers of width 32 over 9 patches and a class token; `sections` overrides."""
    values = {
        "model": {"family": "encoder", "num_layers": 4, "hidden_size": 32, "num_attention_heads": 4, "seq_length": 10},
        "task": {"name": "image_classification", "patch_size": 4, "mixup_alpha": 0.3, "cutmix_alpha": 1.0, "label_smoothing": 0.1,
                 "crop_padding": 1, "horizontal_flip": True},
        "tokenizer": {"model": "none"}, "data": {"datasets": [str(images)], "num_workers": 0},
        "optimizer": {"lr": 3e-3, "lr_warmup_iters": 2, "clip_grad": 0.5},
        "training": {"run_dir": str(run_dir), "train_iters": 20, "micro_batch_size": 2, "global_batch_size": 8, "eval_interval": 0,
                     "eval_iters": 2},
        "monitor": {"log_interval": 5, "tensorboard": False},
    }
    for section, changes in sections.items():
        values.setdefault(section, {}).update(changes)
    return parse_config(values)
