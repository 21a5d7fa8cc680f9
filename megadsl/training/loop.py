"""A training run from its configuration to its last checkpoint: set-up, iterations, validation, saving, resuming.

Everything that decides a step is a pure function of the iteration (data order, learning rate, dropout seeds), so resuming
needs the iteration number, the weights and the optimizer's moments, nothing else.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from megadsl.checkpoint.manifest import CheckpointInfo, library_versions
from megadsl.checkpoint.store import Checkpoint
from megadsl.config import Config, save_config
from megadsl.data.objective import Datasets, open_datasets
from megadsl.data.sampler import MicroBatches
from megadsl.errors import UserError
from megadsl.model.definition import define_model
from megadsl.monitor.progress import LogRecord, Progress
from megadsl.monitor.throughput import tokens_per_sequence, training_flops
from megadsl.monitor.writer import MetricsWriter
from megadsl.parallel.device import peak_memory_bytes, prepare_device
from megadsl.parallel.groups import destroy_groups, initialize_groups
from megadsl.schemes.run import run_statistics
from megadsl.training.checkpointing import Checkpointer, SaveResult, load_state
from megadsl.training.engine import Engine, StepResult
from megadsl.training.hang import Watch, lost_ranks_are_a_sentence
from megadsl.training.preflight import Preflight, preflight
from megadsl.training.schedule import learning_rate
from megadsl.training.signals import Stop, record_job


@dataclass
class Position:
    """How far a run is. `iteration` counts finished iterations."""

    iteration: int = 0
    consumed_samples: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    loss: float | None = None


def train(config: Config, ready: Preflight | None = None, stop: Stop | None = None) -> Path:
    """Run (or resume) the training that `config` describes; returns the folder of the last checkpoint.

    Exits (SystemExit) after a checkpoint where `stop` was asked for by a signal.

    Raises:
        UserError: before any process group is made, where something does not fit (preflight.py); later, where too many
            iterations in a row were not finite.
    """
    ready = ready or preflight(config)
    device = prepare_device(config.training.device, ready.launch.local_rank)
    initialize_groups(ready.launch, ready.topology, device, config.parallel.timeout_minutes)
    try:
        with lost_ranks_are_a_sentence(ready.launch.rank):
            return Run(config, ready, device, stop or Stop()).run()
    finally:
        destroy_groups()


class Run:
    """One process of a run. The process groups exist."""

    def __init__(self, config: Config, ready: Preflight, device: torch.device, stop: Stop):
        topology = ready.topology
        self.config, self.topology, self.device, self.tokenizer = config, topology, device, ready.tokenizer
        self.coordinate = topology.coordinate(ready.launch.rank)
        self.is_main = ready.launch.rank == 0
        self.run_dir = Path(config.training.run_dir)
        self.stop, self.watch = stop, Watch(config.training.hang_minutes, self.run_dir, ready.launch.rank)
        self.progress = Progress(config.training.train_iters, 0, self.is_main)
        self.checkpointer = Checkpointer(config, lambda text: self.progress.log(text))
        try:
            self._set_up(ready)
        except BaseException:
            self.checkpointer.close()
            raise

    def _set_up(self, ready: Preflight) -> None:
        config, topology, device = self.config, self.topology, self.device
        self.store = self.checkpointer.store
        checkpoint = self.checkpointer.resume(ready)
        self.padded_vocab_size = config.tokenizer.padded_vocab_size(self.tokenizer.vocab_size)
        info = checkpoint.info if checkpoint else None
        self.position = Position()
        if info:
            self.position = Position(info.iteration, info.consumed_samples, info.skipped_iterations, loss=info.loss)
        self.left = max(0, config.training.train_iters - self.position.iteration) * config.training.global_batch_size
        self.datasets: Datasets = open_datasets(
            config, self.tokenizer.sha256, train_samples=self.position.consumed_samples + self.left
        )
        self.plan = checkpoint.plan() if checkpoint else ready.plan
        self.engine = Engine(
            config, define_model(config, self.plan, self.padded_vocab_size), topology, self.coordinate, device,
            initialize_weights=not (checkpoint or ready.initial),
        )
        if checkpoint:
            load_state(self.engine.state, checkpoint)
            if info.optimizer_steps is None:
                self.progress.log(f"{checkpoint.path} has no optimizer state: the optimizer starts anew")
        elif ready.initial:
            self._start_from(ready.initial)
        self.writer = self._make_writer() if self.is_main else None
        self.saved_iteration = self.attempted_iteration = self.position.iteration if checkpoint else -1
        self.resumed_topology = checkpoint.topology if checkpoint else topology

    def _start_from(self, initial: Checkpoint) -> None:
        if wrong := self.checkpointer.verify(initial):
            raise UserError(f"checkpoint.init_from {initial.path} is damaged ({wrong}); give another checkpoint.")
        load_state(self.engine.state, initial, weights_only=True)
        self.progress.log(f"starting from the weights of {initial.path}")

    def _make_writer(self) -> MetricsWriter:
        writer = MetricsWriter(self.run_dir, self.position.iteration + 1, self.config.monitor.tensorboard)
        save_config(self.config, self.run_dir / "config.yaml")
        (self.run_dir / "plan.json").write_text(self.plan.to_json(), encoding="utf-8")
        text = (self.run_dir / "config.yaml").read_text(encoding="utf-8")
        writer.write_text("config", "    " + text.replace("\n", "\n    "))  # indented: Markdown shows it as it is
        return writer

    def run(self) -> Path:
        """Train to train_iters, validating and saving on the way and at the end."""
        try:
            with Progress(self.config.training.train_iters, self.position.iteration, self.is_main) as self.progress:
                self._announce()
                self._run()
                self._report(self.checkpointer.wait())
        finally:
            self.checkpointer.close()
            if self.writer:
                self.writer.close()
        if self.stop.code:
            self.stop.leave(self.is_main)
        return self.store.path(self.saved_iteration)

    def _run(self) -> None:
        training, start = self.config.training, self.position.iteration
        batches = self._batches(
            self.datasets.train, self.position.consumed_samples, self.left, self.config.data.num_workers
        )
        interval = Interval(self.config, self.padded_vocab_size, self.topology.world_size, start)
        while self.position.iteration < training.train_iters:
            self._iteration(batches, interval)
            if self.stop.agreed(self.device):
                break
        else:
            self._validate(final=True)
        if self.attempted_iteration != self.position.iteration:
            self._save()

    def _iteration(self, batches: Iterator, interval: "Interval") -> None:
        training, index = self.config.training, self.position.iteration
        lr = learning_rate(index, self.config.optimizer, training.train_iters)
        with self.watch:
            result = self.engine.train_step(batches, index, lr)
        self.position.iteration = done = index + 1
        self.position.consumed_samples += training.global_batch_size
        self._count_skips(result)
        if self.is_main and self.config.checkpoint.on_save_error == "continue" and self.checkpointer.finished():
            self._report(self.checkpointer.wait())
        if self.writer:
            self.writer.write(done, {"train/loss": result.loss, "train/lr": lr, "train/grad_norm": result.gradient_norm})
        self.progress.advance(done, result.loss)
        if done % self.config.monitor.log_interval == 0 or done == training.train_iters:
            record = interval.record(self.position, result, lr, self.device)
            self.progress.log(record.text())
            if self.writer:
                self.writer.write(done, record.scalars())
                self.writer.flush()
        if training.eval_interval and done % training.eval_interval == 0 and done < training.train_iters:
            interval.pause(self._validate)
        if self.config.checkpoint.save_interval and done % self.config.checkpoint.save_interval == 0:
            # A checkpoint of a model that has just failed would push a good one out.
            if self.position.skipped_in_a_row:
                self.progress.log(f"iteration {done} | not saved, because its step was not finite")
            else:
                interval.pause(self._save)

    def _count_skips(self, result: StepResult) -> None:
        position = self.position
        if not result.skipped:
            position.skipped_in_a_row, position.loss = 0, result.loss
            return
        position.skipped += 1
        position.skipped_in_a_row += 1
        self.progress.log(
            f"iteration {position.iteration}: loss {result.loss}, gradient norm {result.gradient_norm}; step skipped"
        )
        if position.skipped_in_a_row >= self.config.training.max_skipped_iterations:
            good = self.store.path(self.saved_iteration) if self.saved_iteration >= 0 else "none: nothing was saved yet"
            raise UserError(
                f"{position.skipped_in_a_row} iterations in a row were not finite, the last one {position.iteration} "
                f"(training.max_skipped_iterations); the last good checkpoint is {good}."
            )

    def _validate(self, final: bool = False) -> None:
        training = self.config.training
        if not training.eval_iters:
            return
        # Read in this process: workers would be started anew for every validation.
        batches = self._batches(self.datasets.validation, 0, training.eval_iters * training.global_batch_size, num_workers=0)
        loss = self.engine.evaluate(batches, training.eval_iters * self.engine.accumulation)
        if self.writer:
            self.writer.write(self.position.iteration, {"validation/loss": loss})
            self.writer.flush()
        entropy = run_statistics(self.config).unigram_entropy if final else None
        note = f" (unigram entropy of the corpus: {entropy:.4f})" if entropy else ""
        self.progress.log(f"iteration {self.position.iteration} | validation loss {loss:.4f} nats per token{note}")

    def _save(self) -> None:
        self._report(self.checkpointer.wait())
        if self.writer:
            self.writer.flush()  # a run that resumes from here keeps the curve up to here
        position = self.position
        info = CheckpointInfo(
            position.iteration, position.consumed_samples, position.skipped, position.loss, self.topology.tensor,
            self.topology.pipeline, self.topology.data, self.config.parallel.zero_stage, self.padded_vocab_size,
            self.tokenizer.sha256, library_versions(), self.engine.state.steps(), self.engine.state.loss_scaler(),
        )
        self.attempted_iteration = position.iteration
        self._report(self.checkpointer.save(self.engine.state, info, self.plan, Path(self.config.tokenizer.model)))

    def _report(self, result: SaveResult | None) -> None:
        if result is None:
            return
        if result.error is None:
            self.saved_iteration = result.iteration
            self.progress.log(f"iteration {result.iteration} | saved {result.path}")
            return
        good = self.store.path(self.saved_iteration) if self.saved_iteration >= 0 else "none"
        sentence = f"checkpoint of iteration {result.iteration} was not saved ({result.error}); the last good one is {good}"
        if self.config.checkpoint.on_save_error == "stop":
            raise UserError(f"The {sentence} (checkpoint.on_save_error=stop).")
        self.progress.log(f"error: the {sentence}; training goes on")

    def _batches(self, dataset, consumed_samples: int, num_samples: int, num_workers: int) -> MicroBatches:
        training = self.config.training
        return MicroBatches(
            dataset, consumed_samples=consumed_samples, micro_batch_size=training.micro_batch_size,
            global_batch_size=training.global_batch_size, data_parallel_rank=self.coordinate.data,
            data_parallel_size=self.topology.data, num_workers=num_workers, num_samples=num_samples,
        )

    def _announce(self) -> None:
        parameters = sum(parameter.numel() for parameter in self.engine.model.parameters())
        self.progress.log(
            f"{self.config.model.num_layers} layers x {self.config.model.hidden_size}, {parameters:,} parameters on this rank, "
            f"scheme {self.plan.scheme} | {self.topology.describe()}, ZeRO {self.config.parallel.zero_stage}, "
            f"{self.config.training.precision} on {self.device}"
        )
        done, wanted = self.position.iteration, self.config.training.train_iters
        if done >= wanted:
            self.progress.log(f"this run is complete at iteration {done}; raise training.train_iters above {done} to go on")
        elif done:
            saved = self.resumed_topology.describe()
            change = "" if saved == self.topology.describe() else f" (saved with {saved})"
            self.progress.log(f"resuming after iteration {done}{change}")
        job = record_job(self.run_dir) if self.is_main else ""
        if job:
            self.progress.log(job)


class Interval:
    """Rates over the iterations since the last log line; time spent validating and saving is not counted."""

    def __init__(self, config: Config, padded_vocab_size: int, world_size: int, iteration: int):
        self._config = config
        self._tokens_per_iteration = config.training.global_batch_size * tokens_per_sequence(config.model)
        self._flops = config.training.global_batch_size * training_flops(config.model, padded_vocab_size)
        self._world_size = world_size
        self._iteration = iteration
        self._started = time.perf_counter()

    def pause(self, work) -> None:
        """Run `work` off the clock."""
        begun = time.perf_counter()
        work()
        self._started += time.perf_counter() - begun

    def record(self, position: Position, result: StepResult, lr: float, device: torch.device) -> LogRecord:
        """The log line for the interval that ends now; starts the next one."""
        now = time.perf_counter()
        seconds = (now - self._started) / (position.iteration - self._iteration)
        self._started, self._iteration = now, position.iteration
        train_iters = self._config.training.train_iters
        return LogRecord(
            position.iteration, train_iters, result.loss, lr, result.gradient_norm,
            self._tokens_per_iteration / seconds, self._flops / seconds / self._world_size / 1e12, peak_memory_bytes(device),
            seconds * (train_iters - position.iteration), position.skipped,
        )
