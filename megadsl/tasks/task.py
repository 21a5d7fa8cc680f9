"""The protocol of a task: everything that training, evaluation, checkpoints and the plan must know of what a model learns.

A new task is a folder under megadsl/tasks/ with one class derived from `Task`, and a line in registry.py. Importing a task's module
must not load torch: a run is checked before it is (training/preflight.py). What needs torch imports it in the method.

**Sums and counts.** A task's loss has one or more parts (masked tokens and sentence order, say). Of a micro-batch it returns the sum
of every part; `counts` says how many items each sums over. A step's loss is, added over the parts, the sum over the global batch by
the count over the global batch: it does not depend on how the batch is cut into micro-batches and ranks.

Shape letters: s sequence, b micro-batch, h hidden.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from megadsl.config import Config
from megadsl.config.load import validate_section
from megadsl.config.model import ModelConfig
from megadsl.config.section import Section
from megadsl.data.epoch_order import evenly_spread
from megadsl.errors import UserError
from megadsl.theory.inputs import TokenStatistics

if TYPE_CHECKING:
    import torch

    from megadsl.data.tokenizer import Tokenizer
    from megadsl.inference.load import TrainedModel
    from megadsl.inference.sampling import Sampling
    from megadsl.model.activations import Activations
    from megadsl.model.builder import ModelBuilder, TaskLayers
    from megadsl.model.definition import ModelDefinition
    from megadsl.schemes.plan import SignalPlan

Batch = dict[str, "torch.Tensor"]


class Sum(NamedTuple):
    """A sum over a number of items; sums of several batches add up, and the mean comes last."""

    total: "torch.Tensor | float"
    count: "torch.Tensor | float"


class Extent(NamedTuple):
    """How much of a batch is used: tokens that are not padding, and all positions, padding included."""

    tokens: int
    positions: int


@dataclass(frozen=True)
class LossPart:
    """A part of the loss: its name in logs, and what its mean is counted in."""

    name: str
    unit: str


class Splits(ABC):
    """The training, validation and test samples of a run, each a map-style dataset of samples {name: tensor}."""

    train: Any
    validation: Any
    test: Any


@dataclass(frozen=True)
class EvaluationRequest:
    """What `megadsl evaluate` was asked for. None: not asked for; a task refuses what it does not know (`Task.evaluate`)."""

    data: str | None = None
    split: str = "test"
    batch_tokens: int = 4096
    max_tokens: int | None = None
    pseudo_tokens: int | None = None
    max_samples: int | None = None
    corruptions: bool | None = None
    corrupted: Path | None = None
    figures: Path | None = None
    num_beams: int | None = None
    length_penalty: float | None = None
    hypotheses: Path | None = None
    max_examples: int | None = None


class Task(ABC):
    """What a model learns.

    Attributes:
        name: as in task.name.
        Options: the section that task.* is validated by (task.name excepted).
        families: model.family that the task can be learnt by.
        loss_parts: see the top of this file.
        metric_names: what `metrics` returns, in order.
        evaluation_options: fields of EvaluationRequest, beside data, split and batch_tokens, that `evaluate` reads.
        exports_itself: whether `export_huggingface` writes the model, for which no architecture of a language model will do.
        saved: folder of the checkpoint that the task was loaded with, where its `files()` lie; None: a run of its own.
    """

    name: ClassVar[str]
    Options: ClassVar[type[Section]] = Section
    families: ClassVar[tuple[str, ...]] = ("decoder", "encoder", "encoder_decoder")
    loss_parts: tuple[LossPart, ...] = (LossPart("loss", "nats"),)
    metric_names: tuple[str, ...] = ()
    evaluation_options: ClassVar[tuple[str, ...]] = ()
    exports_itself: ClassVar[bool] = False
    saved: Path | None = None

    def __init__(self, config: Config):
        """UserError where task.* is not what the task takes, or where the model's family does not go with it."""
        self.config = config
        self.options = validate_section(self.Options, config.task.options, "task")
        if config.model.family not in self.families:
            raise UserError(f"task.name {self.name} does not go with model.family {config.model.family}; it is a task of {' and '.join(self.families)}.")

    # What is known without torch.

    @property
    def model(self) -> ModelConfig:
        """The model section as the theory and the layers shall see it (a classifier has no tied head, say)."""
        return self.config.model

    @abstractmethod
    def check(self) -> None:
        """UserError where data on disk, lengths or options do not fit; in well under a second."""

    @abstractmethod
    def input_statistics(self) -> TokenStatistics:
        """What the theory starts from: second moment and overlap of what enters the trunk, and the gradient at the head."""

    def describe_inputs(self) -> str:
        """Where `input_statistics` come from, for the title of a plan."""
        return f"{self.input_statistics().vocab_size} outputs"

    @property
    def tokenizer(self) -> "Tokenizer | None":
        """The tokenizer of the run, where the task has one."""
        return None

    @property
    def samples_per_epoch(self) -> int | None:
        """Training samples, where the data are a list of them (training.train_epochs counts in it) and are there already."""
        return None

    @property
    def padded_output_size(self) -> int:
        """Rows of the output matrix: a vocabulary padded to a multiple, or the number of classes."""
        return self.input_statistics().vocab_size

    def files(self) -> dict[str, bytes]:
        """Small files that a checkpoint needs to be used alone, by name (tokenizer.model, names of labels)."""
        return {}

    @abstractmethod
    def data_fingerprints(self) -> dict[str, str]:
        """What identifies the data that a run reads, by a name for each part: a resumed run must find the same."""

    # What needs torch.

    @abstractmethod
    def splits(self, train_samples: int) -> Splits:
        """The datasets; `train_samples` from the start of the run are enough for the train split."""

    def collate(self, samples: Sequence[Batch]) -> Batch:
        """Samples -> a batch, padded where they are of unequal size. Every rank that reads a micro-batch gets the same one."""
        import torch

        return {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}

    @property
    @abstractmethod
    def inputs(self) -> tuple[str, ...]:
        """Names of the batch's tensors that the model reads."""

    @property
    @abstractmethod
    def targets(self) -> tuple[str, ...]:
        """Names of the batch's tensors that loss and metrics read."""

    @abstractmethod
    def layers(self, builder: "ModelBuilder") -> "TaskLayers":
        """The layers in front of the trunk and behind it."""

    def define_model(self, plan: "SignalPlan", output_size: int | None = None) -> "ModelDefinition":
        """The whole model under a plan; `output_size` replaces the task's (as a checkpoint has it)."""
        from megadsl.model.builder import ModelBuilder
        from megadsl.model.definition import define_model

        builder = ModelBuilder(self.config, self.model, plan, output_size or self.padded_output_size)
        return define_model(builder, self.layers(builder), self.inputs, self.targets)

    @abstractmethod
    def loss(self, output: "Activations", targets: Batch) -> "Sequence[torch.Tensor]":
        """The sum of every part of the loss over one micro-batch, in fp32 or fp64, in the order of `loss_parts`.

        `output` is what the last layer puts out; logits of a vocabulary are sliced over tensor-parallel ranks.
        """

    @abstractmethod
    def counts(self, batch: Batch) -> Sequence[float]:
        """How many items every part of the loss sums over, of a batch on the host, before the forward pass."""

    def metrics(self, output: "Activations", targets: Batch) -> "Sequence[Sum]":
        """Further sums while validating and evaluating, in the order of `metric_names`."""
        return ()

    def extent(self, batch: Batch) -> Extent:
        """Tokens of a batch on the host that are not padding, and all positions."""
        positions = next(iter(batch.values())).shape[0] * self.positions_per_sample
        return Extent(positions, positions)

    def real_positions(self, batch: Batch) -> Batch:
        """By stack, which positions of a batch are not padding, [b, s] bool; a stack that is not named has none."""
        return {}

    @property
    def positions_per_sample(self) -> int:
        """Positions that flow through layers for one sample, padding included."""
        return sum(self.model.stack_lengths.values())

    def head_multiplications(self) -> float:
        """Multiplications of the head's matrices for one sample (FLOPs are counted by them)."""
        return float(self.model.hidden_size * self.padded_output_size)

    def validation_note(self) -> str:
        """What helps to judge the last validation loss; "" for nothing."""
        return ""

    # What a trained model is asked for.

    def evaluate(self, model: "TrainedModel", request: EvaluationRequest) -> dict[str, float | int | None]:
        """The field's numbers of a trained model on a split; on all ranks together, each gets the result.

        Raises:
            UserError: the request has what this task does not know.
        """
        self.require_known(request)
        from megadsl.tasks.evaluation import mean_results

        dataset = getattr(self.splits(0), request.split)
        return mean_results(self, model, dataset, request)

    def evaluation_samples(self, request: EvaluationRequest, count: int) -> "list[Batch]":
        """At most `count` samples of what `request` names, spread over it, to look at a model with; UserError where there is none."""
        dataset = self.evaluation_dataset(request)
        return [dataset[index] for index in evenly_spread(len(dataset), count)]

    def evaluation_dataset(self, request: EvaluationRequest) -> Any:
        """The samples that `request` names, each once."""
        return getattr(self.splits(0), request.split)

    def require_known(self, request: EvaluationRequest) -> None:
        """UserError at the first option of a request that the task does not read."""
        for option in [field.name for field in fields(request)][3:]:
            if getattr(request, option) is not None and option not in self.evaluation_options:
                raise UserError(f"--{option.replace('_', '-')} does not go with task.name {self.name}; leave it away.")

    def describe_results(self, results: dict[str, float | int | None]) -> str:
        """The line that `megadsl evaluate` prints."""
        return " | ".join(f"{name.replace('_', ' ')} {value:,.4f}" if isinstance(value, float) else f"{name.replace('_', ' ')} {value:,}"
                          for name, value in results.items() if value is not None and not isinstance(value, str))

    def generate(self, model: "TrainedModel", prompt: str, max_new_tokens: int, sampling: "Sampling", num_samples: int,
                 num_beams: int) -> list[str]:
        """Texts that the model writes; UserError where it writes none."""
        raise UserError(f"A model of task.name {self.name} writes no text; megadsl evaluate shows what it does.")

    def describe_samples(self, split: str, count: int) -> "Sequence[Any]":
        """What `megadsl data show` prints: objects that rich can print."""
        dataset = getattr(self.splits(count), split)
        return [f"sample {index}: " + ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in dataset[index].items())
                for index in range(min(count, len(dataset)))]

    def export_sample(self) -> Batch:
        """Real inputs to compare an exported model's logits on; UserError where no architecture exists for the task."""
        raise UserError(f"A model of task.name {self.name} has no counterpart to export to.")

    def export_huggingface(self, model: "TrainedModel", plan: "SignalPlan", folder: Path) -> tuple[str, float]:
        """Write a model of `exports_itself` for transformers -> (its class, largest relative difference of logits)."""
        raise NotImplementedError
