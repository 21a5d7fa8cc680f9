"""What the tasks share whose encoder-decoder writes a text: samples, target side of a batch, loss with smoothed labels, evaluation.

Shape letters: b micro-batch, s source positions, t target tokens, v vocabulary.
"""

from abc import abstractmethod
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from megadsl.config import Config
from megadsl.errors import UserError
from megadsl.tasks.target_text.options import TargetTextOptions
from megadsl.tasks.target_text.stored import StoredTexts
from megadsl.tasks.task import Batch, EvaluationRequest, Extent, LossPart, Sum
from megadsl.tasks.tokenized import TokenizedTask
from megadsl.theory.inputs import TokenStatistics

if TYPE_CHECKING:
    import torch

    from megadsl.inference.load import TrainedModel
    from megadsl.model.activations import Activations
    from megadsl.tasks.target_text.samples import Examples, TextSplits

# Token ids that pad a batch; nothing sees them.
_PAD = 0


class TargetTextTask(TokenizedTask):
    """A task over a folder of target_text/stored.py.

    A batch is padded to its own longest source and target; under a pipeline, whose buffers have one size, to model.seq_length and
    model.decoder_seq_length. Padding changes no number but by rounding.
    """

    Options: ClassVar[type[TargetTextOptions]] = TargetTextOptions
    options: TargetTextOptions
    families = ("encoder_decoder",)
    loss_parts = (LossPart("target_tokens", "nats per token"),)
    metric_names = ("cross_entropy", "token_accuracy")
    evaluation_options = ("num_beams", "length_penalty", "hypotheses", "max_examples")

    def __init__(self, config: Config):
        super().__init__(config)
        if config.model.num_tokentypes:
            raise UserError(f"model.num_tokentypes does not go with task.name {self.name}; set model.num_tokentypes=0.")

    # What the tasks differ in.

    @abstractmethod
    def open_folder(self, folder: Path) -> StoredTexts:
        """A dataset folder; UserError where it is none of this task."""

    @abstractmethod
    def source(self, stored: StoredTexts, split: str, index: int, rng: np.random.RandomState | None) -> dict[str, np.ndarray]:
        """The source of an example, for training with what `rng` does to it."""

    @abstractmethod
    def positions(self, lengths: np.ndarray) -> np.ndarray:
        """Positions of the encoder for sources of these lengths."""

    @abstractmethod
    def collate_sources(self, samples: Sequence[Batch], positions: int) -> Batch:
        """The source side of a batch, padded to so many positions of the encoder."""

    # The protocol.

    @property
    def folder(self) -> Path:
        datasets = self.config.data.datasets
        if len(datasets) != 1:
            raise UserError(f"data.datasets must name one folder for task.name {self.name}, for example data.datasets=DIR.")
        return Path(datasets[0].path)

    @cached_property
    def stored(self) -> StoredTexts:
        found = self.open_folder(self.folder)
        found.require_tokenizer(self.tokenizer)
        return found

    def check(self) -> None:
        splits = ("train", "validation") if self.config.training.eval_iters else ("train",)
        for split in splits:
            if not self.stored.size(split):
                raise UserError(f"The {split} split of {self.folder} is empty; make the dataset with more rows, or set training.eval_iters=0.")
            self.require_room(self.stored, split)

    def require_room(self, stored: StoredTexts, split: str) -> None:
        """UserError where an example of a split is longer than the model."""
        sources, targets = self.positions(stored.source_lengths(split)), stored.target_lengths(split) + 1
        for key, lengths, room in (("model.seq_length", sources, self.model.seq_length),
                                   ("model.decoder_seq_length", targets, self.model.target_length)):
            if lengths.size and lengths.max() > room:
                name = stored.texts(split)[int(lengths.argmax())]["id"]
                raise UserError(f"{stored.folder}: the example {name} of the {split} split takes {lengths.max()} positions, but {key} is {room}; "
                                f"set {key}={lengths.max()}, or make the dataset without such long rows.")

    def data_fingerprints(self) -> dict[str, str]:
        return {"data.datasets.0": self.stored.fingerprint}

    def splits(self, train_samples: int) -> "TextSplits":
        from megadsl.tasks.target_text.order import BucketedOrder
        from megadsl.tasks.target_text.samples import TextSplits, TrainingSamples

        training, stored = self.config.training, self.stored
        train = self.examples(stored, "train")
        lengths = self.positions(stored.source_lengths("train"))[:len(train)]
        order = BucketedOrder(lengths, training.seed, training.global_batch_size, self.options.bucket_batches)
        found = {"train": train, "validation": self.examples(stored, "validation"), "test": self.examples(stored, "test")}
        return TextSplits(TrainingSamples(train, order, training.seed), found)

    def examples(self, stored: StoredTexts, split: str) -> "Examples":
        """Each example of a split once."""
        from megadsl.tasks.target_text.samples import Examples

        count = self.train_size if stored is self.stored and split == "train" else stored.size(split)
        return Examples(stored, split, lambda *which: self.source(stored, *which), count)

    @property
    def train_size(self) -> int:
        """Examples that are learnt from."""
        return min(self.stored.size("train"), self.options.max_train_examples or self.stored.size("train"))

    @property
    def targets(self) -> tuple[str, ...]:
        return ("labels", "loss_mask")

    @property
    def _fixed_size(self) -> bool:
        return self.config.parallel.pipeline_model_parallel_size > 1

    def collate(self, samples: Sequence[Batch]) -> Batch:
        positions = max(int(self.positions(np.array([self.source_length(sample)]))[0]) for sample in samples)
        return {**self.collate_sources(samples, self.model.seq_length if self._fixed_size else positions), **self._collate_targets(samples)}

    @abstractmethod
    def source_length(self, sample: Batch) -> int:
        """Length of a sample's source, as `positions` counts it."""

    def _collate_targets(self, samples: Sequence[Batch]) -> Batch:
        """target_tokens [b, t] (labels shifted right behind bos), labels [b, t] (eos at the end), loss_mask [b, t]."""
        import torch

        length = self.model.target_length if self._fixed_size else max(len(sample["target"]) for sample in samples) + 1
        tokens, labels = (torch.full((len(samples), length), _PAD) for _ in range(2))
        loss_mask = torch.zeros(len(samples), length)
        for row, sample in enumerate(samples):
            target, end = sample["target"], len(sample["target"])
            tokens[row, 0], tokens[row, 1:end + 1] = self.tokenizer.bos, target
            labels[row, :end], labels[row, end] = target, self.tokenizer.eos
            loss_mask[row, :end + 1] = 1
        return {"target_tokens": tokens, "labels": labels, "loss_mask": loss_mask}

    def counts(self, batch: Batch) -> Sequence[float]:
        return (float(batch["loss_mask"].sum()),)

    def loss(self, output: "Activations", targets: Batch) -> "Sequence[torch.Tensor]":
        from megadsl.model.loss import smoothed_token_losses, token_losses_and_log_normalizers

        logits, labels = output["logits"], targets["labels"]
        if self.options.label_smoothing:
            losses = smoothed_token_losses(logits, labels, self.options.label_smoothing, self.tokenizer.vocab_size)
        else:
            # Not token_losses: Megatron's function writes over the logits, which the metrics read too.
            losses = token_losses_and_log_normalizers(logits, labels)[0]
        return ((losses * targets["loss_mask"]).double().sum(),)

    def metrics(self, output: "Activations", targets: Batch) -> Sequence[Sum]:
        from megadsl.model.loss import likeliest_tokens, token_losses_and_log_normalizers

        counted = targets["loss_mask"]
        right = likeliest_tokens(output["logits"], self.tokenizer.vocab_size) == targets["labels"]
        count = counted.sum()
        losses = token_losses_and_log_normalizers(output["logits"], targets["labels"])[0]
        return Sum((losses * counted).double().sum(), count), Sum((right * counted).sum(), count)

    def extent(self, batch: Batch) -> Extent:
        real = self.real_positions(batch)
        return Extent(sum(int(mask.sum()) for mask in real.values()), sum(mask.numel() for mask in real.values()))

    # The plan.

    @cached_property
    def target_statistics(self) -> TokenStatistics:
        """Of the decoder's words, as the training examples have them."""
        targets = [self.stored.target("train", index) for index in range(self.train_size)]
        return target_statistics(targets, self.tokenizer.vocab_size, self.tokenizer.eos)

    def validation_note(self) -> str:
        return f"unigram entropy of the targets: {self.target_statistics.unigram_entropy:.4f}"

    # Evaluation.

    def evaluate(self, model: "TrainedModel", request: EvaluationRequest) -> dict[str, float | int | str | None]:
        """Loss and token accuracy under the true targets, and the scores of what beam search writes."""
        self.require_known(request)
        from megadsl.tasks.evaluation import mean_results
        from megadsl.tasks.target_text.hypotheses import evaluate_hypotheses
        from megadsl.tasks.target_text.samples import by_length

        stored = self.open_folder(Path(request.data)) if request.data else self.stored
        stored.require_tokenizer(self.tokenizer)
        self.require_room(stored, request.split)
        examples = self.examples(stored, request.split)
        if not len(examples):
            raise UserError(f"The {request.split} split of {stored.folder} is empty; choose another with --split.")
        chosen = by_length(examples, stored.source_lengths(request.split), request.max_examples)
        results = mean_results(self, model, chosen, request)
        return results | evaluate_hypotheses(self, model, stored, chosen, request)

    def describe_samples(self, split: str, count: int) -> Sequence:
        examples, texts = self.splits(count).examples(split), self.stored.texts(split)
        return [f"{texts[index]['id']}: {self.source_length(examples[index])} source, {' '.join(self.tokenizer.pieces(examples.arrays(index)['target'].tolist()))}"
                for index in range(min(count, len(examples)))]


def target_statistics(targets: Sequence[np.ndarray], vocab_size: int, eos: int) -> TokenStatistics:
    """Statistics of target texts: repeats within a sequence as the mean over pairs of positions of all sequences."""
    counts = np.zeros(vocab_size)
    equal = pairs = 0.0
    for target in targets:
        _, own = np.unique(target, return_counts=True)
        equal += float((own * (own - 1)).sum())
        pairs += (len(target) + 1) * len(target)
        np.add.at(counts, target, 1)
        counts[eos] += 1
    share = counts / counts.sum()
    seen = share[share > 0]
    return TokenStatistics(
        vocab_size, float((share ** 2).sum()), repeat_probability_in_sequence=equal / max(pairs, 1.0),
        unigram_entropy=float(-(seen * np.log(seen)).sum()), num_tokens=int(counts.sum()),
        length=float(np.mean([len(target) + 1 for target in targets])),
    )
