"""What the three language-modelling tasks share: tokenizer, datasets, word embedding, token losses, text to evaluate on.

Shape letters: s sequence, b micro-batch, v vocabulary.
"""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from megadsl.config import Config
from megadsl.data.atomic_files import fingerprint, read_json
from megadsl.data.dataset import MANIFEST, Window, load_dataset, require_tokens
from megadsl.errors import UserError
from megadsl.tasks.language.options import LanguageOptions
from megadsl.tasks.task import Batch, EvaluationRequest, Extent, LossPart, Sum
from megadsl.tasks.tokenized import TokenizedTask
from megadsl.theory.inputs import TokenStatistics, mixed, zipf

if TYPE_CHECKING:
    import numpy as np
    import torch

    from megadsl.inference.load import TrainedModel
    from megadsl.model.activations import Activations
    from megadsl.tasks.language.samples import LanguageSplits, Objective, Spread

DEFAULT_VOCAB_SIZE = 32000


class LanguageTask(TokenizedTask):
    """A task over text that was encoded by `megadsl data preprocess`.

    Attributes:
        predicts_in_place: what is predicted of a position stands, masked or not, at that position of the input.
        filled_target: target tokens that every sample fills, where there are targets beside the input; the rest is padding.
    """

    Options: ClassVar[type[LanguageOptions]] = LanguageOptions
    options: LanguageOptions
    predicts_in_place: ClassVar[bool] = False
    filled_target: int | None = None

    loss_parts = (LossPart("tokens", "nats per token"),)
    evaluation_options = ("max_tokens",)

    def __init__(self, config: Config):
        super().__init__(config)
        if self.options.z_loss:
            self.loss_parts += (LossPart("z_loss", "for every token"),)
        if config.model.num_tokentypes and "tokentypes" not in self.inputs:
            raise UserError(f"model.num_tokentypes does not go with task.name {self.name}; set model.num_tokentypes=0.")

    # What the three differ in.

    @property
    @abstractmethod
    def window(self) -> Window:
        """The raw tokens of a sample; UserError where the model's lengths leave no room."""

    @abstractmethod
    def objective(self) -> "Objective":
        """What makes a sample of a window."""

    @abstractmethod
    def check_pieces(self) -> None:
        """UserError unless the tokenizer has the pieces and the model the lengths that the objective needs."""

    @abstractmethod
    def describe_objective(self) -> str:
        """In a few words, what is predicted."""

    def statistics_of_objective(self, statistics: TokenStatistics) -> TokenStatistics:
        """What the objective makes of the corpus's statistics."""
        return statistics

    # The protocol.

    def check(self) -> None:
        if not self.config.data.datasets:
            raise UserError("data.datasets is empty; name a folder of megadsl data preprocess, for example data.datasets=DIR.")
        self.check_pieces()
        splits = ("train", "validation") if self.config.training.eval_iters else ("train",)
        for dataset in self.config.data.datasets:
            folder = Path(dataset.path)
            manifest = load_dataset(folder, self.tokenizer.sha256)
            for split in splits:
                require_tokens(folder, manifest, split, self.window)

    def input_statistics(self) -> TokenStatistics:
        return replace(self.statistics_of_objective(self._corpus_statistics), z_loss=self.options.z_loss)

    @cached_property
    def _corpus_statistics(self) -> TokenStatistics:
        """Statistics of the datasets in their proportions; a Zipf distribution over the vocabulary where a dataset has none yet."""
        found = [(Path(dataset.path) / "stats.json", dataset.weight) for dataset in self.config.data.datasets]
        if found and all(path.is_file() for path, _ in found):
            return mixed([(TokenStatistics.load(path), weight) for path, weight in found])
        # The vocabulary only matters to Zipf and to the gradient at the head, so a plan can be printed before there is a tokenizer.
        exists = Path(self.config.tokenizer.model).is_file()
        return zipf(self.tokenizer.vocab_size if exists else DEFAULT_VOCAB_SIZE)

    def describe_inputs(self) -> str:
        statistics, count = self.input_statistics(), len(self.config.data.datasets)
        source = f"{statistics.num_tokens:,} tokens of {count} dataset(s)" if statistics.num_tokens else "Zipf"
        return f"vocabulary {statistics.vocab_size}, repeat probability {statistics.repeats:.4f} ({source})"

    def data_fingerprints(self) -> dict[str, str]:
        return {
            f"data.datasets.{index}": fingerprint([read_json(Path(dataset.path) / MANIFEST), dataset.weight])
            for index, dataset in enumerate(self.config.data.datasets)
        }

    def splits(self, train_samples: int) -> "LanguageSplits":
        from megadsl.tasks.language.samples import LanguageSplits

        names = (*self.inputs, *self.targets)
        return LanguageSplits(self.config, self.objective(), self.window, names, train_samples, self.tokenizer.sha256)

    @property
    def targets(self) -> tuple[str, ...]:
        return ("labels", "loss_mask")

    def counts(self, batch: Batch) -> Sequence[float]:
        # z-loss, where it is a part, has the tokens' count.
        return (float(batch["loss_mask"].sum()),) * (2 if self.options.z_loss else 1)

    def loss(self, output: "Activations", targets: Batch) -> "Sequence[torch.Tensor]":
        from megadsl.model.loss import token_losses, token_losses_and_log_normalizers

        logits, labels, counted = output["logits"], targets["labels"], targets["loss_mask"]
        # Added in fp64: what is evaluated does not depend on how many samples a forward pass takes.
        if not self.options.z_loss:
            return ((token_losses(logits, labels) * counted).double().sum(),)
        losses, normalizers = token_losses_and_log_normalizers(logits, labels)
        return (losses * counted).double().sum(), self.options.z_loss * (normalizers.square() * counted).double().sum()

    def extent(self, batch: Batch) -> Extent:
        positions = len(batch["labels"]) * self.positions_per_sample
        return Extent(positions, positions)

    def head_multiplications(self) -> float:
        return self._predicted_positions * self.model.hidden_size * self.padded_output_size

    @property
    def _predicted_positions(self) -> int:
        return list(self.model.stack_lengths.values())[-1]

    def validation_note(self) -> str:
        entropy = self.input_statistics().unigram_entropy
        return f"unigram entropy of the corpus: {entropy:.4f}" if entropy else ""

    # Evaluation.

    def evaluation_text(self, request: EvaluationRequest) -> "tuple[np.ndarray, int]":
        """(token ids, bytes of text) of what `megadsl evaluate --data` names: a dataset's split, or text."""
        from megadsl.data.split_tokens import tokens_of_split
        from megadsl.tasks.language.texts import tokens_of_text

        if request.data is None:
            raise UserError("Name the text to evaluate on: --data DIR (a dataset folder), a file, a folder or python-stdlib.")
        if (Path(request.data) / MANIFEST).is_file():
            return tokens_of_split(Path(request.data), request.split, self.tokenizer.sha256)
        return tokens_of_text(request.data, self.tokenizer)

    def evaluation_sums(self, model: "TrainedModel", tokens: "np.ndarray", request: EvaluationRequest) -> dict[str, Sum]:
        """Sums of loss parts and metrics over windows of `tokens` that do not overlap, spread over all of them where
        request.max_tokens is less."""
        from megadsl.tasks.evaluation import evaluation_sums

        samples = self._spread(tokens, -(-(request.max_tokens or tokens.size) // self.window.length))
        return evaluation_sums(self, model, samples, request)

    def evaluation_samples(self, request: EvaluationRequest, count: int) -> list[Batch]:
        """Of the data that the model was trained on, where the request names none."""
        self.check_pieces()
        trained_on = self.config.data.datasets
        data = request.data or (trained_on[0].path if trained_on else None)
        samples = self._spread(self.evaluation_text(replace(request, data=data))[0], count)
        return [samples[index] for index in range(len(samples))]

    def _spread(self, tokens: "np.ndarray", count: int) -> "Spread":
        """`count` windows of `tokens` that do not overlap, spread over all of them."""
        from megadsl.tasks.language.samples import Spread, StreamSamples

        length = self.window.length
        samples = StreamSamples(tokens, self.objective(), length)
        if not len(samples):
            raise UserError(f"The text has {tokens.size} tokens, but one sample of this model is made from {length}; give more text.")
        return Spread(samples, count)

    def describe_samples(self, split: str, count: int) -> Sequence:
        from megadsl.tasks.language.show import describe_samples

        return describe_samples(self, getattr(self.splits(count), split), split, count)

    def export_sample(self) -> Batch:
        from megadsl.tasks.language.texts import export_rows

        return {"tokens": export_rows(self.tokenizer, self.model.seq_length)}
