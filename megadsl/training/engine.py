"""DeepSpeed behind one face: train_step, evaluate and the canonical state, with and without a pipeline.

The only file of training/ that imports deepspeed, and not at the top: it picks its accelerator when it is imported, which
must be after megadsl.parallel.device has chosen. Shape letters: b micro-batch, s sequence.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megadsl.config import Config
from megadsl.config.deepspeed import deepspeed_config
from megadsl.model.definition import ModelDefinition
from megadsl.model.init import initialize, leave_to_checkpoint
from megadsl.model.stack import SequentialModel, build_pipeline
from megadsl.parallel.groups import DeepSpeedMpu, data_group, tensor_group
from megadsl.parallel.rng import seed_micro_batch
from megadsl.parallel.topology import Coordinate, Topology
from megadsl.training.optimizer import GuardedAdamW, global_gradient_norm, parameter_groups
from megadsl.training.state import EngineState

Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class StepResult:
    """One optimizer step: mean loss over the global batch (nats per token), global gradient norm before clipping."""

    loss: float
    gradient_norm: float

    @property
    def skipped(self) -> bool:
        return not (math.isfinite(self.loss) and math.isfinite(self.gradient_norm))


class Engine:
    """A model under DeepSpeed. Make it after the process groups exist; initialize_weights False: the state is loaded next."""

    def __init__(self, config: Config, definition: ModelDefinition, topology: Topology, coordinate: Coordinate,
                 device: torch.device, initialize_weights: bool = True):
        self.config, self.topology, self.coordinate, self.device = config, topology, coordinate, device
        self.definition = definition
        self.pipelined = topology.pipeline > 1
        self.accumulation = config.gradient_accumulation_steps(topology.world_size)
        if self.pipelined:
            self.model = build_pipeline(definition.entries, definition.loss, topology)
        else:
            self.model = SequentialModel(definition.entries, definition.loss)
        if initialize_weights:
            initialize(self.model.canonical_parameters(), config.training.seed, coordinate.tensor, topology.tensor)
        else:
            leave_to_checkpoint(self.model.canonical_parameters())
        self.model.register_forward_pre_hook(self._seed_forward)
        self._parameters = list(self.model.parameters())
        self._forwards = 0
        self._norm = 0.0
        self._zero_stage = config.parallel.zero_stage
        self.engine = self._initialize_deepspeed()
        self.state = EngineState(
            self.engine, list(self.model.canonical_parameters()), self._zero_stage, topology, coordinate, device
        )

    def _initialize_deepspeed(self):
        import deepspeed

        options = self.config.optimizer
        optimizer = GuardedAdamW(
            parameter_groups(self.model.canonical_parameters(), options, self.definition.role_factors),
            self._gradients_are_finite, lr=options.lr, betas=(options.adam_beta1, options.adam_beta2),
        )
        engine, *_ = deepspeed.initialize(
            model=self.model, optimizer=optimizer, mpu=None if self.pipelined else DeepSpeedMpu(),
            config=deepspeed_config(self.config, self.topology.world_size), dist_init_required=False,
        )
        return engine

    def train_step(self, batches: Iterator[Batch], iteration: int, lr: float) -> StepResult:
        """One optimizer step over `accumulation` micro-batches of this rank.

        Args:
            batches: yields the tensors of the model definition's inputs and targets by name, in the order of the sampler.
            iteration: counted from 0; seeds the dropout masks.
            lr: learning rate of this step.
        """
        self._forwards = iteration * self.accumulation
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr * group["lr_factor"]
        if self.pipelined:
            loss = self.engine.train_batch(data_iter=map(self.definition.split, batches))
            self._norm = self._reported_norm()
        else:
            loss = self._train_plain(batches)
        return StepResult(float(loss), self._norm)

    def _train_plain(self, batches: Iterator[Batch]) -> torch.Tensor:
        self._switch_mode(training=True)
        total = torch.zeros((), device=self.device)
        for index in range(self.accumulation):
            loss = self.engine(*self._on_device(next(batches)))
            self.engine.backward(loss)
            total += loss.detach()
            if self._zero_stage == 0 and index == self.accumulation - 1:
                self._clip_at_zero_0()
            self.engine.step()
        if self._zero_stage:
            self._norm = self._reported_norm()
        total /= self.accumulation
        dist.all_reduce(total, group=data_group())
        return total / self.topology.data

    def _on_device(self, batch: Batch) -> tuple:
        return self.definition.split({name: tensor.to(self.device, non_blocking=True) for name, tensor in batch.items()})

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

    def _gradients_are_finite(self) -> bool:
        return math.isfinite(self._norm if self._zero_stage == 0 else self._reported_norm())

    def _seed_forward(self, module, arguments) -> None:
        if module.training:
            micro_batch = self._forwards * self.topology.data + self.coordinate.data
            seed_micro_batch(self.config.training.seed, micro_batch, self.coordinate.pipeline)
            self._forwards += 1

    @torch.no_grad()
    def evaluate(self, batches: Iterator[Batch], num_micro_batches: int) -> float:
        """Mean loss over `num_micro_batches` micro-batches of every data-parallel rank."""
        if self.pipelined:
            return float(self.engine.eval_batch(map(self.definition.split, batches), num_micro_batches=num_micro_batches))
        self._switch_mode(training=False)
        total = torch.zeros((), device=self.device)
        for _ in range(num_micro_batches):
            total += self.engine(*self._on_device(next(batches)))
        dist.all_reduce(total, group=data_group())
        return float(total / (num_micro_batches * self.topology.data))

    def full_parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(canonical name, full fp32 tensor on the host); to be consumed on all ranks together, each parameter comes out on one."""
        for _, name, tensor in self.state.tensors(("weights",)):
            yield name, tensor
