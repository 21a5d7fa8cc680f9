"""`multiple_choice`: which of a few options answers a question on a passage (RACE, arXiv 1704.04683; the recipe of BERT and RoBERTa).

Every option is a sequence of its own, passage | question option (without a passage: question | option), whose head gives one score; the
softmax runs over the options. Shape letters: b micro-batch, k options.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from megadsl.config import Config
from megadsl.errors import UserError
from megadsl.tasks.task import Batch, EvaluationRequest, LossPart, Sum
from megadsl.tasks.text.classification import PooledTextTask
from megadsl.tasks.text.options import ChoiceOptions
from megadsl.tasks.text.prepared import SplitArrays
from megadsl.tasks.text.sequences import Sequence as TextSequence
from megadsl.tasks.text.sequences import cut_first, sequence_of

if TYPE_CHECKING:
    import torch

    from megadsl.inference.load import TrainedModel
    from megadsl.model.activations import Activations

DEFAULT_OPTIONS = 4  # of RACE, where there are no data yet


class MultipleChoice(PooledTextTask):
    """Batch: tokens, segments (and token types) [b * k, s], labels [b] (-1: has none, and does not count)."""

    name = "multiple_choice"
    kind = "choices"
    exported_as = "MultipleChoice"
    Options = ChoiceOptions
    options: ChoiceOptions
    outputs = 1
    targets = ("labels",)
    loss_parts = (LossPart("choice", "nats per question"),)
    metric_names = ("accuracy",)

    def __init__(self, config: Config):
        super().__init__(config)
        if self.options.num_options is None and self.manifest.get("kind") == self.kind:
            self.options = self.options.model_copy(update={"num_options": self.manifest["parts"] - 2})

    @property
    def sequences_per_sample(self) -> int:
        return self.options.num_options or DEFAULT_OPTIONS

    def check(self) -> None:
        super().check()
        there = self.prepared.manifest["parts"] - 2
        if there != self.sequences_per_sample:
            raise UserError(f"task.num_options is {self.sequences_per_sample}, but the questions of {self.folder} have {there}; leave task.num_options away.")

    def sequences(self, arrays: SplitArrays, row: int) -> tuple[list[TextSequence], dict[str, np.ndarray]]:
        passage, question, *options = (arrays.part(row, part) for part in range(arrays.parts))
        length = self.model.seq_length
        made = []
        for option in options:
            texts = [passage, np.concatenate((question, option))] if len(passage) else [question, option]
            made.append(sequence_of(cut_first(texts, length - self.markers.count(2)), self.markers, length))
        return made, {"labels": np.array(arrays.labels[row], dtype=np.int64)}

    @property
    def unlabelled(self) -> dict[str, np.ndarray]:
        return {"labels": np.array(-1)}

    def _scores(self, output: "Activations") -> "torch.Tensor":
        """[b, k]."""
        return output["logits"].float().view(-1, self.sequences_per_sample)

    def loss(self, output: "Activations", targets: Batch) -> "Sequence[torch.Tensor]":
        import torch.nn.functional as F

        return (F.cross_entropy(self._scores(output), targets["labels"], ignore_index=-1, reduction="none").double().sum(),)

    def counts(self, batch: Batch) -> Sequence[float]:
        return (float((batch["labels"] >= 0).sum()),)

    def metrics(self, output: "Activations", targets: Batch) -> Sequence[Sum]:
        counted = targets["labels"] >= 0
        return (Sum((self._scores(output).argmax(dim=-1) == targets["labels"])[counted].sum(), counted.sum()),)

    def evaluate(self, model: "TrainedModel", request: EvaluationRequest) -> dict[str, float | int | None]:
        import torch
        import torch.nn.functional as F

        from megadsl.tasks.text.metrics import majority_share, torchmetrics
        from megadsl.tasks.text.predictions import outputs_of

        self.require_known(request)
        functional, options = torchmetrics(self.name), self.sequences_per_sample
        prepared = self.prepared_at(request.data)
        samples = self.samples_of(prepared, request.split)
        scores = outputs_of(self, model, samples, request.batch_tokens, options, lambda output, batch: self._scores(output))
        labels = torch.from_numpy(np.array(prepared.split(request.split).labels)).long()
        accuracy = functional.accuracy(scores.argmax(dim=1), labels, task="multiclass", num_classes=options, average="micro")
        return {"loss": float(F.cross_entropy(scores, labels)), "accuracy": float(accuracy), "majority_share": majority_share(labels),
                "chance": 1.0 / options, "samples": len(samples)}
