"""Fashion-MNIST (arXiv 1708.07747; MIT licence): 60,000 + 10,000 grey images of 28 x 28, ten kinds of clothes, from Debian's package."""

from pathlib import Path

from megadsl.data.debian import fetch_package

PACKAGE, INSIDE = "dataset-fashion-mnist", "usr/share/datasets/fashion-mnist"
CLASSES = ("T-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
FILES = tuple(f"{split}-{kind}-ubyte.gz" for split in ("train", "t10k") for kind in ("images-idx3", "labels-idx1"))


def fetch_fashion_mnist(output: Path) -> bool:
    """Fill `output` with the idx files and classes.txt; whether they were there already."""
    if all((output / name).is_file() for name in (*FILES, "classes.txt")):
        return True
    fetch_package(PACKAGE, INSIDE, output)
    (output / "classes.txt").write_text("\n".join(CLASSES) + "\n", encoding="utf-8")
    return False
