"""A task that lives in the tests alone: classify sequences of float vectors of unequal length, without a tokenizer.

It proves that a task is one class (megadsl/tasks/task.py): the package knows nothing of it. A dataset folder holds train.npz,
validation.npz and test.npz with vectors [rows, d], lengths [samples] and labels [samples] (-1: has none, and does not count).
Shape letters: b micro-batch, s model.seq_length, d vector size, h hidden, c classes.
"""

import hashlib
from functools import partial
from pathlib import Path

import numpy as np
from pydantic import Field

from megadsl.config.model import ModelConfig
from megadsl.config.section import Section
from megadsl.errors import UserError
from megadsl.tasks.task import Extent, LossPart, Splits, Sum, Task
from megadsl.theory.inputs import TokenStatistics


class VectorOptions(Section):
    """Options of vector_classification."""

    num_classes: int = Field(4, ge=2)


class VectorClassification(Task):
    """Batch: vectors [b, s, d] fp32, segments [b, s] (0: padding), labels [b]."""

    name = "vector_classification"
    Options = VectorOptions
    families = ("encoder", "decoder")
    loss_parts = (LossPart("classes", "nats per sequence"),)
    metric_names = ("accuracy",)
    inputs = ("vectors", "segments")
    targets = ("labels",)

    @property
    def model(self) -> ModelConfig:
        return self.config.model.model_copy(update={"untie_embeddings_and_output_weights": True})

    @property
    def folder(self) -> Path:
        return Path(self.config.data.datasets[0].path)

    def check(self) -> None:
        if not self.config.data.datasets or not (self.folder / "train.npz").is_file():
            raise UserError("data.datasets names no folder of vectors.")

    def input_statistics(self) -> TokenStatistics:
        vectors, lengths, _ = _load(self.folder / "train.npz")
        second = float(np.square(vectors).mean())
        overlap = np.mean([((part.sum(0) ** 2).sum() - np.square(part).sum()) / (len(part) * (len(part) - 1) * part.shape[1])
                           for part in np.split(vectors, np.cumsum(lengths)[:-1])])
        return TokenStatistics(
            self.options.num_classes, float(overlap / second), num_tokens=len(vectors), projected_size=vectors.shape[1],
            projected_second_moment=second, gradient_correlation=1.0,
        )

    def data_fingerprints(self) -> dict[str, str]:
        return {"data.datasets.0": hashlib.sha256((self.folder / "train.npz").read_bytes()).hexdigest()}

    def splits(self, train_samples: int) -> Splits:
        return VectorSplits(self.folder, self.config.training.seed, train_samples)

    def collate(self, samples):
        import torch

        length = self.model.seq_length  # one size, because a pipeline's buffers have one
        return {
            "vectors": torch.stack([torch.nn.functional.pad(s["vectors"], (0, 0, 0, length - len(s["vectors"]))) for s in samples]),
            "segments": torch.stack([(torch.arange(length) < len(s["vectors"])).long() for s in samples]),
            "labels": torch.stack([s["label"] for s in samples]),
        }

    def layers(self, builder):
        from megadsl.model.builder import TaskLayers
        from megadsl.model.stack import LayerEntry
        from vector_layers import MeanClassifier, VectorProjection

        size = self.input_statistics().projected_size
        stds, head = builder.plan.embedding.weight_std, builder.plan.head.weight_std
        return TaskLayers(
            inputs=[
                LayerEntry("embedding.projection", partial(VectorProjection, builder.core, size, stds["input_projection"])),
                builder.embedding_sum("embedding", self.model.seq_length),
            ],
            head=[LayerEntry("classifier", partial(MeanClassifier, builder.core, self.options.num_classes, head["output_head"]))],
            context=("segments",), isolated=True,
        )

    def loss(self, output, targets):
        import torch.nn.functional as F

        return (F.cross_entropy(output["logits"].float(), targets["labels"], ignore_index=-1, reduction="sum"),)

    def counts(self, batch):
        return (float((batch["labels"] >= 0).sum()),)

    def metrics(self, output, targets):
        counted = targets["labels"] >= 0
        return (Sum((output["logits"].argmax(dim=-1) == targets["labels"])[counted].sum(), counted.sum()),)

    def real_positions(self, batch):
        return dict.fromkeys(self.model.stack_layers, batch["segments"] > 0)

    def extent(self, batch):
        return Extent(int((batch["segments"] > 0).sum()), batch["segments"].numel())


class VectorSplits(Splits):
    """Sample i of a split is number i mod n of its epoch's permutation."""

    def __init__(self, folder: Path, seed: int, train_samples: int):
        self.train, self.validation, self.test = (
            Vectors(*_load(folder / f"{split}.npz"), seed if split == "train" else None) for split in ("train", "validation", "test"))


class Vectors:
    """Map-style dataset of {"vectors": [n, d], "label": []}; endless in a shuffled order where there is a seed."""

    def __init__(self, vectors: np.ndarray, lengths: np.ndarray, labels: np.ndarray, seed: int | None):
        self._parts, self._labels, self._seed = np.split(vectors, np.cumsum(lengths)[:-1]), labels, seed

    def __len__(self) -> int:
        return len(self._parts) if self._seed is None else 2**40

    def __getitem__(self, index: int):
        import torch

        epoch, place = divmod(index, len(self._parts))
        if self._seed is not None:
            place = np.random.RandomState([self._seed, epoch]).permutation(len(self._parts))[place]
        return {"vectors": torch.from_numpy(self._parts[place]), "label": torch.tensor(int(self._labels[place]))}


def write_vectors(folder: Path, size: int = 12, longest: int = 16, classes: int = 4) -> Path:
    """Sequences whose class is the direction of a common part of their vectors; every fifth one has no label."""
    rng = np.random.RandomState(7)
    folder.mkdir(parents=True)
    directions = rng.standard_normal((classes, size)).astype(np.float32)
    for split, count in (("train", 96), ("validation", 32), ("test", 40)):
        lengths, labels = rng.randint(4, longest + 1, count), rng.randint(0, classes, count)
        vectors = np.repeat(directions[labels], lengths, axis=0) + rng.standard_normal((lengths.sum(), size)).astype(np.float32)
        np.savez(folder / f"{split}.npz", vectors=vectors.astype(np.float32), lengths=lengths,
                 labels=np.where(np.arange(count) % 5 == 4, -1, labels))
    return folder


def _load(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    with np.load(path) as file:
        return file["vectors"], file["lengths"], file["labels"]
