"""`text_classification`: a label, or a value, of one or two sentences (GLUE, arXiv 1804.07461; the recipe of arXiv 1810.04805, section 4.1).

An encoder's head is BERT's: tanh of a dense over <cls>, then a matrix; a decoder's is a matrix over the last token.
Shape letters: b micro-batch, c labels (1: a value is predicted).
"""

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from megadsl.config import Config
from megadsl.errors import UserError
from megadsl.tasks.task import Batch, EvaluationRequest, LossPart, Sum
from megadsl.tasks.text.options import ClassificationOptions, TextOptions
from megadsl.tasks.text.prepared import SplitArrays
from megadsl.tasks.text.sequences import Sequence as TextSequence
from megadsl.tasks.text.sequences import sequence_of
from megadsl.tasks.text.task import TextTask

if TYPE_CHECKING:
    import torch

    from megadsl.inference.load import TrainedModel
    from megadsl.model.activations import Activations
    from megadsl.model.builder import ModelBuilder
    from megadsl.model.stack import LayerEntry


class PooledTextTask(TextTask):
    """A task whose head reads one vector of a sequence."""

    Options = TextOptions
    options: TextOptions
    outputs: int

    def __init__(self, config: Config):
        super().__init__(config)
        if self.model.family == "decoder" and self.pooled == "first":
            raise UserError("task.pooling=first does not go with model.family decoder, whose first token sees nothing of the text; use last or mean.")

    @property
    def pooled(self) -> str:
        if self.options.pooling != "auto":
            return self.options.pooling
        return "first" if self.model.family == "encoder" else "last"

    def head(self, builder: "ModelBuilder") -> "LayerEntry":
        from megadsl.model.stack import LayerEntry
        from megadsl.tasks.text.heads import PooledHead

        return LayerEntry("classifier", partial(PooledHead, builder, self.outputs, self.pooled, self.model.family == "encoder"))


class TextClassification(PooledTextTask):
    """Batch: tokens, segments (and token types) [b, s], labels [b] (-1, or NaN of a value: has none, and does not count)."""

    name = "text_classification"
    kind = "classification"
    exported_as = "SequenceClassification"
    Options = ClassificationOptions
    options: ClassificationOptions
    targets = ("labels",)

    def __init__(self, config: Config):
        super().__init__(config)
        if self.options.labels is None and self.manifest:
            # What is saved beside a checkpoint says them, so that it can be used without its data.
            self.options = self.options.model_copy(update={"labels": tuple(self.manifest.get("labels", ()))})
        self.labels = self.options.labels or ()
        self.outputs = max(1, len(self.labels))
        self.loss_parts = (LossPart("label", "nats per text" if self.labels else "squared error"),)
        self.metric_names = ("accuracy",) if self.labels else ()

    def check(self) -> None:
        super().check()
        if self.labels != self.prepared.labels:
            raise UserError(f"task.labels are {', '.join(self.labels) or 'none'}, but {self.folder} has {', '.join(self.prepared.labels) or 'none'}; leave task.labels away.")

    def sequences(self, arrays: SplitArrays, row: int) -> tuple[list[TextSequence], dict[str, np.ndarray]]:
        texts = [arrays.part(row, part) for part in range(arrays.parts)]
        return [sequence_of(texts, self.markers, self.model.seq_length)], {"labels": self._label(arrays.labels[row])}

    def _label(self, value: float) -> np.ndarray:
        return np.array(value, dtype=np.int64 if self.labels else np.float32)

    @property
    def unlabelled(self) -> dict[str, np.ndarray]:
        return {"labels": self._label(-1 if self.labels else np.nan)}

    def loss(self, output: "Activations", targets: Batch) -> "Sequence[torch.Tensor]":
        import torch.nn.functional as F

        logits, labels = output["logits"].float(), targets["labels"]
        if self.labels:
            return (F.cross_entropy(logits, labels, ignore_index=-1, reduction="none").double().sum(),)
        counted = ~labels.isnan()
        return ((logits.squeeze(1)[counted] - labels[counted]).square().double().sum(),)

    def counts(self, batch: Batch) -> Sequence[float]:
        labels = batch["labels"]
        return (float((labels >= 0).sum() if self.labels else (~labels.isnan()).sum()),)

    def metrics(self, output: "Activations", targets: Batch) -> Sequence[Sum]:
        if not self.labels:
            return ()
        counted = targets["labels"] >= 0
        return (Sum((output["logits"].argmax(dim=-1) == targets["labels"])[counted].sum(), counted.sum()),)

    def describe_target(self, sample: Batch) -> str:
        return f" ({self.labels[int(sample['labels'])]})" if self.labels else ""

    def evaluate(self, model: "TrainedModel", request: EvaluationRequest) -> dict[str, float | int | None]:
        import torch
        import torch.nn.functional as F

        from megadsl.tasks.text.metrics import class_metrics, torchmetrics, value_metrics
        from megadsl.tasks.text.predictions import outputs_of

        self.require_known(request)
        torchmetrics(self.name)  # before the model runs
        prepared = self.prepared_at(request.data)
        samples = self.samples_of(prepared, request.split)
        logits = outputs_of(self, model, samples, request.batch_tokens, self.outputs, lambda output, batch: output["logits"])
        labels = torch.from_numpy(np.array(prepared.split(request.split).labels))
        if self.labels:
            found = {"loss": float(F.cross_entropy(logits, labels)), **class_metrics(self.name, logits, labels)}
        else:
            found = value_metrics(self.name, logits.squeeze(1), labels.double())
        return {**found, "samples": len(samples)}
