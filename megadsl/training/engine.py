"""DeepSpeed behind one face: train_step, evaluate and the canonical state, with and without a pipeline.

The loss of a step is the sum over the global batch by the count over the global batch (tasks/task.py), so the counts of all its
micro-batches are added up before the first forward pass.

The only file of training/ that imports deepspeed, and not at the top: it picks its accelerator when it is imported, which
must be after megadsl.parallel.device has chosen. Shape letters: b micro-batch, s sequence.
"""

import contextlib
import io
import math
from collections.abc import Callable, Container, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist

from megadsl.config import Config
from megadsl.config.deepspeed import deepspeed_config
from megadsl.model.activations import Activations
from megadsl.model.init import ParameterTag, initialize, leave_to_checkpoint, tag_of
from megadsl.model.precision import prepare_precision
from megadsl.model.stack import SequentialModel, build_pipeline
from megadsl.parallel.device import ahead_on_device
from megadsl.parallel.groups import DeepSpeedMpu, join_deepspeed, sum_over_data_ranks, sum_over_replicas_and_stages, tensor_group
from megadsl.parallel.rng import seed_micro_batch
from megadsl.parallel.topology import Coordinate, Topology
from megadsl.schemes.plan import SignalPlan
from megadsl.tasks.task import Batch, Task
from megadsl.training.measuring import Measuring
from megadsl.training.optimizer import GuardedAdamW, LayerDepths, freeze, global_gradient_norm, parameter_groups
from megadsl.training.qk_clip import QKClip
from megadsl.training.state import EngineState

@dataclass(frozen=True)
class StepResult:
    """One optimizer step: loss over the global batch, global gradient norm before clipping, and what the batch held.

    Attributes:
        parts: mean of every part of the loss, by name.
        tokens: tokens that are not padding.
        positions: all positions, padding included.
        largest_score: of attention, before any cap; None: not searched (optimizer.qk_clip).
        refused: whether an alarm refused the step (monitor.alarms, action skip); the weights are as before it.
    """

    loss: float
    gradient_norm: float
    parts: dict[str, float] = field(default_factory=dict)
    tokens: int = 0
    positions: int = 0
    largest_score: float | None = None
    refused: bool = False

    @property
    def finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.gradient_norm)

    @property
    def skipped(self) -> bool:
        return self.refused or not self.finite


@dataclass(frozen=True)
class ValidationResult:
    """The loss, and the mean of every part of it and of every metric, by name."""

    loss: float
    means: dict[str, float]


class Engine:
    """A model under DeepSpeed. Make it after the process groups exist.

    Args:
        filled: names of parameters that a checkpoint will fill: nothing is drawn for them.
        refuses: asked before every optimizer step with the loss and the gradient norm, on all ranks together and with one answer:
            whether this step is left out. None: no step is.
    """

    def __init__(self, config: Config, task: Task, plan: SignalPlan, topology: Topology, coordinate: Coordinate, device: torch.device,
                 filled: Container[str] = (), refuses: Callable[[float, float], bool] | None = None):
        self.config, self.task, self.topology, self.coordinate, self.device = config, task, topology, coordinate, device
        self.definition = task.define_model(plan)
        self.pipelined = topology.pipeline > 1
        self.reads_data = coordinate.pipeline in (0, topology.pipeline - 1)
        self.accumulation = config.gradient_accumulation_steps(topology.world_size)
        self._loss = _GlobalLoss(task, self.definition.targets, device)
        join_deepspeed(device)
        if self.pipelined:
            self.model = build_pipeline(self.definition.entries, self.definition.inputs, self._loss, topology)
        else:
            self.model = SequentialModel(self.definition.entries)
        prepare_precision(self.model, config.training.precision)
        parameters = list(self.model.canonical_parameters())
        initialize((pair for pair in parameters if pair[0] not in filled), config.training.seed, coordinate.tensor, topology.tensor)
        leave_to_checkpoint(pair for pair in parameters if pair[0] in filled)
        self._depths = LayerDepths(self.definition.entries, config.training.freeze_layers)
        freeze(parameters, self._depths)
        self.model.register_forward_pre_hook(self._seed_forward)
        self._parameters = list(self.model.parameters())
        self._forwards = 0
        self._norm = 0.0
        self._refuses = refuses
        self._begin_step()
        self._zero_stage = config.parallel.zero_stage
        self.engine = self._initialize_deepspeed()
        self.state = EngineState(
            self.engine, list(self.model.canonical_parameters()), self._zero_stage, topology, coordinate, device
        )
        self.measuring = Measuring(
            task, plan, self.model.calls(), self.definition.embedding, self.state, self._optimizer, topology, coordinate, device,
            self._depths.is_frozen)
        self._qk_clip = QKClip(self.model, self.state, config.optimizer, device) if config.optimizer.qk_clip else None

    def _initialize_deepspeed(self):
        import deepspeed

        options = self.config.optimizer
        self._optimizer = GuardedAdamW(
            parameter_groups(self.model.canonical_parameters(), options, self.definition.role_factors, self._depths),
            self._is_taken, lr=options.lr, betas=(options.adam_beta1, options.adam_beta2),
        )
        # What DeepSpeed prints while it starts (memory, in 16 bits) is noise in a job log.
        with contextlib.redirect_stdout(io.StringIO()):
            engine, *_ = deepspeed.initialize(
                model=self.model, optimizer=self._optimizer, mpu=None if self.pipelined else DeepSpeedMpu(),
                config=deepspeed_config(self.config, self.topology.world_size), dist_init_required=False,
            )
        return engine

    def train_step(self, batches: Iterator[Batch], iteration: int, lr: float, measured: bool = False) -> StepResult:
        """One optimizer step over `accumulation` micro-batches of this rank.

        Args:
            batches: yields the tensors of the task's inputs and targets by name, in the order of the sampler; not read where
                `reads_data` is False.
            iteration: counted from 0; seeds the dropout masks.
            lr: learning rate of this step.
            measured: measure the signal of this step (`measuring.read` gives it).
        """
        with self.measuring.step(iteration) if measured else nullcontext():
            return self._step(batches, iteration, lr)

    def _step(self, batches: Iterator[Batch], iteration: int, lr: float) -> StepResult:
        self._forwards = iteration * self.accumulation
        self._begin_step()
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr * group["lr_factor"]
        micro_batches = [next(batches) for _ in range(self.accumulation)] if self.reads_data else []
        # DeepSpeed averages over micro-batches and data ranks; the factor makes a sum of it.
        self._loss.begin(micro_batches, factor=self.accumulation * self.topology.data)
        on_device = ahead_on_device(micro_batches, self.device)
        if self.pipelined:
            with self.measuring.micro_batch(micro_batches[0] if micro_batches else None):
                self.engine.train_batch(data_iter=map(self.definition.as_tuples, on_device))
            self._norm = self._reported_norm()
        else:
            self._train_plain(on_device)
        parts, tokens, positions = self._totals()
        result = StepResult(sum(parts.values()), self._norm, parts, round(tokens), round(positions), refused=self._refused)
        return replace(result, largest_score=self._qk_clip.after_step(not result.skipped)) if self._qk_clip else result

    def _begin_step(self) -> None:
        self._taken: bool | None = None  # not known yet
        self._refused = False
        self._ended: tuple | None = None

    def _totals(self) -> tuple[dict[str, float], float, float]:
        """(mean of every part of the loss, tokens, positions) of the global batch: one collective a step, whenever it is asked for."""
        if self._ended is None:
            sums, tokens, positions = self._loss.end()
            parts = {part.name: total / max(1.0, count) for part, (total, count) in zip(self.task.loss_parts, sums, strict=True)}
            self._ended = parts, tokens, positions
        return self._ended

    def _train_plain(self, micro_batches: Iterator[Batch]) -> None:
        self._switch_mode(training=True)
        for index, batch in enumerate(micro_batches):
            with self.measuring.micro_batch(batch) if index == 0 else nullcontext():
                loss = self._loss(self.engine(self.definition.inputs_of(batch)), batch)
                self.engine.backward(loss)
            if self._zero_stage == 0 and index == self.accumulation - 1:
                self._clip_at_zero_0()
            self.engine.step()
        if self._zero_stage:
            self._norm = self._reported_norm()

    def _switch_mode(self, training: bool) -> None:
        # train() and eval() walk through every module, which is felt at a thousand layers.
        if self.model.training != training:
            self.engine.train(training)

    def _clip_at_zero_0(self) -> None:
        norm = global_gradient_norm(self._parameters, self.coordinate.tensor, tensor_group())
        if self.config.optimizer.clip_grad:
            torch.nn.utils.clip_grads_with_norm_(self._parameters, self.config.optimizer.clip_grad, norm)
        self._norm = float(norm)

    def _reported_norm(self) -> float:
        norm = getattr(self.engine.optimizer, "_global_grad_norm", None)
        # DeepSpeed marks a norm that is not finite with -1 in places.
        return float(norm) if norm is not None and norm >= 0 else math.inf

    def _is_taken(self) -> bool:
        """Whether the optimizer takes this step; decided once, though asked for every parameter group."""
        if self._taken is None:
            norm = self._norm if self._zero_stage == 0 else self._reported_norm()
            self._taken = math.isfinite(norm)
            if self._taken and self._refuses is not None:
                self._refused = self._refuses(sum(self._totals()[0].values()), norm)
                self._taken = not self._refused
        return self._taken

    def _seed_forward(self, module, arguments) -> None:
        if module.training:
            micro_batch = self._forwards * self.topology.data + self.coordinate.data
            seed_micro_batch(self.config.training.seed, micro_batch, self.coordinate.pipeline)
            if self.pipelined:
                self.measuring.forward(first=self._forwards % self.accumulation == 0)
            self._forwards += 1

    @torch.no_grad()
    def evaluate(self, batches: Iterator[Batch], num_micro_batches: int, progressed: Callable[[], None] = lambda: None) -> ValidationResult:
        """Loss and metrics over `num_micro_batches` micro-batches of every data-parallel rank.

        They are read in groups of `accumulation`, a training step's worth; `progressed` is called after each group.
        """
        totals = 0.0
        for start in range(0, num_micro_batches, self.accumulation):
            count = min(self.accumulation, num_micro_batches - start)
            micro_batches = [next(batches) for _ in range(count)] if self.reads_data else []
            self._loss.begin(micro_batches, factor=1, metrics=True)
            on_device = ahead_on_device(micro_batches, self.device)
            if self.pipelined:
                self.engine.eval_batch(map(self.definition.as_tuples, on_device), num_micro_batches=count)
            else:
                self._switch_mode(training=False)
                for batch in on_device:
                    self._loss(self.engine(self.definition.inputs_of(batch)), batch)
            totals = totals + torch.tensor(self._loss.end()[0], dtype=torch.float64)
            progressed()
        names = [*(part.name for part in self.task.loss_parts), *self.task.metric_names]
        means = {name: total / max(1.0, count) for name, (total, count) in zip(names, totals.tolist(), strict=True)}
        return ValidationResult(sum(means[part.name] for part in self.task.loss_parts), means)

    def parameter_tags(self) -> Iterator[tuple[str, ParameterTag]]:
        """(canonical name, tag) of this stage's parameters."""
        for name, parameter in self.model.canonical_parameters():
            yield name, tag_of(name, parameter)

    def names_on_all_ranks(self, names: set[str]) -> set[str]:
        """The names that any rank gives; on all ranks together."""
        gathered = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, names)
        return set().union(*gathered)

    def total_parameters(self) -> int:
        """Parameters of the whole model; on all ranks together."""
        own = sum(
            torch.Size(tag_of(name, parameter).full_shape).numel() for name, parameter in self.model.canonical_parameters()
            if not getattr(parameter, "ds_pipe_replicated", False)  # a tied one is counted on the stage that comes first
        )
        return round(sum_over_replicas_and_stages(torch.tensor(float(own), dtype=torch.float64, device=self.device)).item()
                     / self.topology.data)

    def full_parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(canonical name, full fp32 tensor on the host); to be consumed on all ranks together, each parameter comes out on one."""
        for _, name, tensor in self.state.tensors(("weights",)):
            yield name, tensor


class _GlobalLoss:
    """A task's loss as DeepSpeed wants it: one number a micro-batch, whose average is the loss of the global batch.

    `begin` adds up the counts of a global batch, the calls give the loss of each micro-batch and keep the sums, `end` gives the
    sums of all ranks. Everything stays on the device until then.
    """

    def __init__(self, task: Task, targets: tuple[str, ...], device: torch.device):
        self._task, self._targets, self._device = task, targets, device
        self._parts = len(task.loss_parts)

    def begin(self, micro_batches: list[Batch], factor: int, metrics: bool = False) -> None:
        """`micro_batches` of this rank, still on the host (none on stages that read none)."""
        counts = torch.zeros(self._parts + 2, dtype=torch.float64)
        for batch in micro_batches:
            counts += torch.tensor([*self._task.counts(batch), *self._task.extent(batch)], dtype=torch.float64)
        self._counts = counts.to(self._device)
        everywhere = sum_over_data_ranks(self._counts[:self._parts].clone())
        self._weights = (factor / everywhere.clamp(min=1.0)).float()
        rows = self._parts + (len(self._task.metric_names) if metrics else 0)
        self._metrics = metrics
        # (total, count) of every part and metric; totals of this rank's last stage only.
        self._sums = torch.zeros(rows, 2, dtype=torch.float64, device=self._device)
        self._called = False

    def __call__(self, output: Activations, targets: Batch | tuple[torch.Tensor, ...]) -> torch.Tensor:
        if not isinstance(targets, dict):
            targets = dict(zip(self._targets, targets, strict=True))
        totals = torch.stack(tuple(self._task.loss(output, targets)))
        self._called = True
        self._sums[:self._parts, 0] += totals.detach()
        if self._metrics:
            found = self._task.metrics(output, targets)
            for row, (total, count) in enumerate(found, start=self._parts):
                self._sums[row] += torch.stack((total, count)).to(self._sums)
        return totals.float() @ self._weights

    def end(self) -> tuple[list[list[float]], float, float]:
        """([(total, count)] of all parts and metrics, tokens, positions) of the global batch, the same on all ranks."""
        if self._called:  # stages before the last one read the same batches
            self._sums[:self._parts, 1] = self._counts[:self._parts]
        else:
            self._counts.zero_()
        found = sum_over_replicas_and_stages(torch.cat([self._sums.flatten(), self._counts[self._parts:]])).tolist()
        sums, (tokens, positions) = found[:-2], found[-2:]
        return [sums[index:index + 2] for index in range(0, len(sums), 2)], tokens, positions
