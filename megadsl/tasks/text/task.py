"""What the finetuning tasks over short texts share: prepared folder, markers, padding, the statistics of what the model reads.

Rows are padded to the longest of a micro-batch, rounded up (a pipeline's buffers have one size: to model.seq_length). Padding is seen by
no position. Shape letters: s sequence, b micro-batch, k sequences of a sample.
"""

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from megadsl.config.model import ModelConfig
from megadsl.data.atomic_files import read_json
from megadsl.data.epoch_order import evenly_spread
from megadsl.errors import UserError
from megadsl.tasks.task import Batch, EvaluationRequest, Extent, Splits
from megadsl.tasks.text.prepared import MANIFEST, PreparedText, SplitArrays
from megadsl.tasks.text.sequences import Markers, require_room
from megadsl.tasks.text.sequences import Sequence as TextSequence
from megadsl.tasks.tokenized import TokenizedTask
from megadsl.theory.inputs import TokenStatistics, zipf

if TYPE_CHECKING:
    from megadsl.inference.load import TrainedModel
    from megadsl.model.builder import ModelBuilder, TaskLayers
    from megadsl.model.stack import LayerEntry
    from megadsl.schemes.plan import SignalPlan
    from megadsl.tasks.text.samples import TextSamples

# A micro-batch is padded to a multiple of this.
PADDED_TO = 8
# Rows that the statistics are measured on, spread over the training split.
MEASURED_ROWS = 512
# Real inputs that an exported model is compared on.
EXPORT_SAMPLES = 4
DEFAULT_VOCAB_SIZE = 32000


class TextTask(TokenizedTask):
    """A task over a folder of `megadsl data text`.

    Attributes:
        kind: the command that prepares its folder.
        exported_as: the head's name in transformers' classes (bert_heads.HeadKind).
        labels: names of the classes, where it has any.
        pooled: the head reads the first token, the last one, the mean of all, or ("all") every token by itself.
    """

    families = ("encoder", "decoder")
    exports_itself = True
    kind: ClassVar[str]
    exported_as: ClassVar[str]
    labels: tuple[str, ...] = ()

    # What they differ in.

    @property
    @abstractmethod
    def pooled(self) -> str:
        """See above."""

    @abstractmethod
    def sequences(self, arrays: SplitArrays, row: int) -> tuple[list[TextSequence], dict[str, np.ndarray]]:
        """(the sequences of a sample, its targets by name)."""

    @property
    @abstractmethod
    def unlabelled(self) -> dict[str, np.ndarray]:
        """Targets that do not count."""

    @abstractmethod
    def head(self, builder: "ModelBuilder") -> "LayerEntry":
        """The layer behind the trunk."""

    @property
    def sequences_per_sample(self) -> int:
        return 1

    def count_samples(self, arrays: SplitArrays) -> int:
        """Samples of a split."""
        return len(arrays)

    # The protocol.

    @property
    def model(self) -> ModelConfig:
        return self.config.model.model_copy(update={"untie_embeddings_and_output_weights": True})

    @property
    def folder(self) -> Path | None:
        """The prepared folder of the run."""
        datasets = self.config.data.datasets
        return Path(datasets[0].path) if datasets else None

    @property
    def manifest(self) -> dict:
        """What the prepared folder says of itself; empty where there is none yet."""
        return (read_json(self.folder / MANIFEST) or {}) if self.folder else {}

    @cached_property
    def prepared(self) -> PreparedText:
        return self.prepared_at(None)

    def prepared_at(self, data: str | None) -> PreparedText:
        """The prepared folder that `megadsl evaluate --data` names (None: the run's own)."""
        folder = self.folder if data is None else Path(data)
        if folder is None:
            raise UserError(f"data.datasets is empty; name a folder of megadsl data text {self.kind}, for example data.datasets=DIR.")
        return PreparedText(folder, self.kind, self.tokenizer.sha256)

    @cached_property
    def markers(self) -> Markers:
        return Markers.of(self.tokenizer, self.model.family)

    def check(self) -> None:
        if len(self.config.data.datasets) > 1:
            raise UserError(f"task.name {self.name} reads one prepared folder, but data.datasets names {len(self.config.data.datasets)}.")
        prepared = self.prepared
        require_room(self.model.seq_length, 2, self.markers)
        prepared.split("train")
        if self.config.training.eval_iters:
            prepared.split("validation")

    @property
    def samples_per_epoch(self) -> int | None:
        if not self.manifest or not Path(self.config.tokenizer.model).is_file():
            return None
        return self.count_samples(self.prepared.split("train"))

    def data_fingerprints(self) -> dict[str, str]:
        return {"data.datasets.0": self.prepared.fingerprint}

    def input_statistics(self) -> TokenStatistics:
        return self._statistics

    @cached_property
    def _statistics(self) -> TokenStatistics:
        """Measured on training rows as the model reads them; Zipf's law where there are none yet."""
        at = {"gradient_correlation": 1.0 if self.pooled == "mean" else 0.0,
              "read_position": {"first": 0, "last": -1}.get(self.pooled)}
        if not self.manifest:
            exists = Path(self.config.tokenizer.model).is_file()
            law = zipf(self.tokenizer.vocab_size if exists else DEFAULT_VOCAB_SIZE)
            return TokenStatistics(law.vocab_size, law.repeat_probability, **at)
        pairs = equal = same_type = inverse = tokens = count = 0.0
        for sequence in self._measured_sequences():
            n = len(sequence.tokens)
            for values, is_type in ((sequence.tokens, False), (sequence.types, True)):
                found = float((np.unique(values, return_counts=True)[1] ** 2).sum() - n)
                equal, same_type = (equal, same_type + found) if is_type else (equal + found, same_type)
            pairs, inverse, tokens, count = pairs + n * (n - 1.0), inverse + 1.0 / n, tokens + n, count + 1
        same = same_type / pairs if self.model.num_tokentypes > 1 else 1.0
        return TokenStatistics(self.tokenizer.vocab_size, equal / pairs, num_tokens=int(tokens), same_type_probability=same,
                               length=count / inverse, **at)

    def _measured_sequences(self) -> Iterator[TextSequence]:
        arrays = self.prepared.split("train")
        for row in evenly_spread(self.count_samples(arrays), MEASURED_ROWS):
            yield from self.sequences(arrays, row)[0]

    def describe_inputs(self) -> str:
        found = self.input_statistics()
        if found.length is None:
            return f"vocabulary {found.vocab_size} (Zipf), head on the {self.pooled} token"
        return (f"vocabulary {found.vocab_size}, repeat probability {found.repeats:.4f} and mean length {found.length:.1f} in "
                f"{found.num_tokens:,} tokens of training rows, gradient at {'the ' + self.pooled if found.read_position is not None else 'all'} token(s)")

    def splits(self, train_samples: int) -> Splits:
        return TextSplits(self, self.prepared, self.config.training.seed)

    def collate(self, samples: Sequence[Batch]) -> Batch:
        import torch

        from megadsl.tasks.text.samples import padded

        longest = max(sample["tokens"].size(1) for sample in samples)
        length = self.model.seq_length
        if self.config.parallel.pipeline_model_parallel_size == 1:
            length = min(length, -(-longest // PADDED_TO) * PADDED_TO)
        batch = padded(list(samples), length, max(0, self.tokenizer.pad), self.model.num_tokentypes)
        return batch | {name: torch.stack([sample[name] for sample in samples]) for name in self.targets}

    @property
    def inputs(self) -> tuple[str, ...]:
        return ("tokens", "segments", *(("tokentypes",) if self.model.num_tokentypes else ()))

    def layers(self, builder: "ModelBuilder") -> "TaskLayers":
        from megadsl.model.builder import TaskLayers

        return TaskLayers(
            inputs=[builder.word_embedding(), builder.embedding_sum("embedding", self.model.seq_length)],
            head=[self.head(builder)], context=("segments",), isolated=True,
        )

    def extent(self, batch: Batch) -> Extent:
        return Extent(int((batch["segments"] > 0).sum()), batch["segments"].numel())

    def real_positions(self, batch: Batch) -> Batch:
        return dict.fromkeys(self.model.stack_layers, batch["segments"] > 0)

    @property
    def positions_per_sample(self) -> int:
        return self.sequences_per_sample * super().positions_per_sample

    def head_multiplications(self) -> float:
        # BERT's pooler, or a few outputs a token: nothing beside the trunk.
        return float(self.model.hidden_size ** 2)

    def evaluation_dataset(self, request: EvaluationRequest) -> "TextSamples":
        return self.samples_of(self.prepared_at(request.data), request.split)

    def samples_of(self, prepared: PreparedText, split: str, seed: int | None = None) -> "TextSamples":
        """The samples of a split; in a random order without an end where there is a seed."""
        from megadsl.tasks.text.samples import TextSamples

        arrays = prepared.split(split)
        return TextSamples(self.count_samples(arrays), lambda row: self.sequences(arrays, row), self.unlabelled, seed)

    def export_sample(self) -> Batch:
        batch = self.collate(self.evaluation_samples(EvaluationRequest(None, "validation"), EXPORT_SAMPLES))
        return {name: batch[name] for name in self.inputs}

    def export_huggingface(self, model: "TrainedModel", plan: "SignalPlan", folder: Path) -> tuple[str, float]:
        import torch

        from megadsl.checkpoint.export_source import ExportSource
        from megadsl.checkpoint.huggingface.bert_heads import Head, export_finetuned

        if self.model.family != "encoder" or self.pooled not in ("first", "all"):
            raise UserError(f"A {self.model.family} whose head reads the {self.pooled} token has no place in BERT's classes, which the finetuned "
                            "tasks are exported to: they are encoders that read the first token (task.pooling=first).")
        sample = self.export_sample()
        with torch.inference_mode():
            logits = model(sample)["logits"]
        if self.sequences_per_sample > 1:
            logits = logits.view(-1, self.sequences_per_sample)
            sample = {name: tensor.view(len(logits), self.sequences_per_sample, -1) for name, tensor in sample.items()}
        source = ExportSource(self.config.model_copy(update={"model": self.model}), plan, model.network, model.definition, sample,
                              self.tokenizer, Path(self.config.tokenizer.model), self.padded_output_size)
        return export_finetuned(source, Head(self.exported_as, self.labels), logits, folder)

    def describe_samples(self, split: str, count: int) -> Iterator[str]:
        dataset = getattr(self.splits(count), split)
        yield f"{self.name} | {split}: {dataset.samples_per_epoch:,} samples an epoch"
        for index in range(min(count, len(dataset))):
            sample = dataset[index]
            targets = ", ".join(f"{name} {sample[name].tolist()}" for name in self.targets)
            yield f"\nsample {index}: {targets}{self.describe_target(sample)}"
            for tokens, length in zip(sample["tokens"].tolist(), sample["lengths"].tolist(), strict=True):
                yield "  " + " ".join(self.tokenizer.pieces(tokens[:length])).replace("\n", "\u21b5")

    def describe_target(self, sample: Batch) -> str:
        """What `megadsl data show` adds to a sample's targets."""
        return ""


class TextSplits(Splits):
    """The splits of a run; each is opened when it is first asked for."""

    def __init__(self, task: TextTask, prepared: PreparedText, seed: int):
        self._task, self._prepared, self._seed = task, prepared, seed

    @cached_property
    def train(self) -> "TextSamples":
        return self._task.samples_of(self._prepared, "train", self._seed)

    @cached_property
    def validation(self) -> "TextSamples":
        return self._task.samples_of(self._prepared, "validation")

    @cached_property
    def test(self) -> "TextSamples":
        return self._task.samples_of(self._prepared, "test")
