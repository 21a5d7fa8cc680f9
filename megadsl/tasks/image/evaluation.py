"""What `megadsl evaluate` reports of an image classifier: accuracy, calibration, confusion, and robustness to corrupted images.

Calibration error is the expected one over 15 bins of confidence of equal width (Guo et al., arXiv 1706.04599): the mean over images of
|accuracy - mean confidence| of their bin. Everything is a sum over images, so it does not depend on batches or ranks.
Shape letters: b batch, k classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from megadsl.data.epoch_order import evenly_spread
from megadsl.errors import UserError
from megadsl.inference.load import TrainedModel
from megadsl.model.activations import Activations
from megadsl.tasks.evaluation import add_up
from megadsl.tasks.image.corruptions import SEVERITIES, CorruptedImages, corruption_names, open_corrupted
from megadsl.tasks.image.prepared import MANIFEST, Images, Prepared
from megadsl.tasks.image.samples import PlainImages
from megadsl.tasks.task import Batch, EvaluationRequest

if TYPE_CHECKING:
    from megadsl.tasks.image.task import ImageClassification

BINS = 15


@dataclass(frozen=True)
class Tally:
    """Sums over images: `scores` [4] (loss, images, right at first, right among five), `bins` [BINS, 3] (images, confidence, right),
    `confusion` [k, k] (label, answer)."""

    scores: torch.Tensor
    bins: torch.Tensor
    confusion: torch.Tensor

    @classmethod
    def of(cls, numbers: torch.Tensor, classes: int) -> "Tally":
        """From all of them in a row."""
        scores, bins, confusion = numbers.split((4, 3 * BINS, classes * classes))
        return cls(scores, bins.view(BINS, 3), confusion.view(classes, classes))

    @property
    def accuracy(self) -> float:
        return float(self.scores[2] / self.scores[1])

    @property
    def calibration_error(self) -> float:
        return float((self.bins[:, 2] - self.bins[:, 1]).abs().sum() / self.bins[:, 0].sum())


def tally_batch(logits: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    """logits [b, k], label [b] -> the numbers of a Tally in a row, but for the loss, which is 0."""
    classes, probabilities = logits.size(1), logits.double().softmax(dim=-1)
    confidence, answer = probabilities.max(dim=-1)
    right = (answer == label).double()
    among_five = (logits.topk(min(5, classes), dim=1).indices == label.unsqueeze(1)).any(dim=1).double()
    bins = logits.new_zeros(BINS, 3, dtype=torch.float64)
    place = (confidence * BINS).long().clamp(max=BINS - 1)
    bins.index_add_(0, place, torch.stack((torch.ones_like(right), confidence, right), dim=1))
    confusion = torch.bincount(label * classes + answer, minlength=classes * classes).double()
    scores = torch.stack((right.new_zeros(()), right.new_tensor(float(len(label))), right.sum(), among_five.sum()))
    return torch.cat((scores, bins.flatten(), confusion))


def evaluate(task: "ImageClassification", model: TrainedModel, request: EvaluationRequest) -> dict:
    """The results; figures where `request` names a folder for them."""
    classes = task.described.classes
    images = _images(task, request)
    clean = _tally(task, model, PlainImages(task.described, images), request, "clean images")
    results = {
        "loss": float(clean.scores[0] / clean.scores[1]), "top1_accuracy": clean.accuracy,
        "top5_accuracy": float(clean.scores[3] / clean.scores[1]), "calibration_error": clean.calibration_error,
        "samples": int(clean.scores[1]),
    }
    by_corruption = _by_corruption(task, model, request, images)
    if by_corruption:
        accuracies = [one for row in by_corruption.values() for one in row.values()]
        mean = sum(accuracies) / len(accuracies)
        results |= {"corrupted_accuracy": mean, "relative_drop": 1.0 - mean / clean.accuracy if clean.accuracy else None,
                    "corruptions": by_corruption}
    if request.figures is not None and model.is_main:
        from megadsl.tasks.image.report import write_figures

        write_figures(request.figures, clean.confusion.numpy(), clean.bins.numpy(), classes, results)
    return results


def _images(task: "ImageClassification", request: EvaluationRequest) -> Images:
    """The images that `request` names, or at most max_samples of them, spread over all."""
    prepared = task.prepared if request.data is None else Prepared(Path(request.data))
    ours, theirs = task.described, prepared.described
    if (theirs.height, theirs.width, theirs.channels, len(theirs.classes)) != (ours.height, ours.width, ours.channels, len(ours.classes)):
        raise UserError(f"{prepared.folder} holds images of {theirs.height} x {theirs.width} with {theirs.channels} channels and {len(theirs.classes)} "
                        f"classes; the model reads {ours.height} x {ours.width}, {ours.channels} and {len(ours.classes)}.")
    images = prepared.split(request.split)
    if not len(images):
        raise UserError(f"The {request.split} split of {prepared.folder / MANIFEST} is empty; choose another with --split.")
    places = evenly_spread(len(images), request.max_samples or len(images))
    return images if len(places) == len(images) else Images(images.images[places], images.labels[places])


def _tally(task: "ImageClassification", model: TrainedModel, samples: torch.utils.data.Dataset, request: EvaluationRequest, title: str) -> Tally:
    classes = len(task.described.classes)

    def measure(output: Activations, batch: Batch, counts: Sequence[float]) -> torch.Tensor:
        numbers = tally_batch(output["logits"].float(), batch["label"])
        numbers[0] = task.loss(output, batch)[0]
        return numbers

    return Tally.of(add_up(task, model, samples, request, measure, (4 + 3 * BINS + classes * classes,), title), classes)


def _by_corruption(task: "ImageClassification", model: TrainedModel, request: EvaluationRequest, images: Images) -> dict[str, dict[str, float]]:
    """Accuracy by corruption and severity ("1" to "5"): of images corrupted here, or of a folder of corrupted ones."""
    found: dict[str, dict[str, float]] = {}
    if request.corrupted is not None:
        for (name, severity), samples in open_corrupted(request.corrupted, task.described, request.max_samples).items():
            found.setdefault(name, {})[severity] = _tally(task, model, samples, request, f"{name} {severity}").accuracy
    elif request.corruptions:
        for name in corruption_names():
            for severity in SEVERITIES:
                samples = CorruptedImages(task.described, images, name, severity)
                found.setdefault(name, {})[str(severity)] = _tally(task, model, samples, request, f"{name} {severity}").accuracy
    return found
