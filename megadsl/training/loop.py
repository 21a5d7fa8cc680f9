"""A training run from its configuration to its last checkpoint: set-up, iterations, validation, saving, resuming.

Everything that decides a step is a pure function of the iteration (data order, learning rate, dropout seeds), so resuming
needs the iteration number, the weights and the optimizer's moments, nothing else.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from megadsl.checkpoint.manifest import CheckpointInfo, library_versions
from megadsl.config import Config, save_config
from megadsl.data.sampler import MicroBatches
from megadsl.errors import UserError
from megadsl.monitor.compare import agreement
from megadsl.monitor.progress import Progress
from megadsl.monitor.signal import SignalRecord
from megadsl.monitor.writer import MetricsWriter
from megadsl.parallel.device import prepare_device
from megadsl.parallel.groups import destroy_groups, initialize_groups
from megadsl.training.checkpointing import Checkpointer, SaveResult, load_state
from megadsl.training.engine import Engine, StepResult, ValidationResult
from megadsl.training.hang import Phase, Watch, lost_ranks_are_a_sentence
from megadsl.training.initial import InitialWeights
from megadsl.training.interval import Interval
from megadsl.training.preflight import Preflight, data_change, preflight
from megadsl.training.recovery import Recovery
from megadsl.training.schedule import learning_rate
from megadsl.training.signals import Stop, record_job


@dataclass
class Position:
    """How far a run is. `iteration` counts finished iterations; `first_loss` is that of the run's first finite one."""

    iteration: int = 0
    consumed_samples: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    loss: float | None = None
    first_loss: float | None = None

    @classmethod
    def of(cls, info: CheckpointInfo) -> "Position":
        return cls(info.iteration, info.consumed_samples, info.skipped_iterations, 0, info.loss, info.first_loss)


def train(config: Config, ready: Preflight | None = None, stop: Stop | None = None) -> Path:
    """Run (or resume) the training that `config` describes; returns the folder of the last checkpoint.

    Exits (SystemExit) after a checkpoint where `stop` was asked for by a signal.

    Raises:
        UserError: before any process group is made, where something does not fit (preflight.py); later, where too many
            iterations in a row were not finite, or an alarm stops the run (recovery.py).
    """
    ready = ready or preflight(config)
    device = prepare_device(config.training.device, ready.launch.local_rank, config.training.deterministic)
    initialize_groups(ready.launch, ready.topology, device, config.parallel.timeout_minutes)
    try:
        with lost_ranks_are_a_sentence(ready.launch.rank, Path(config.training.run_dir)):
            return Run(config, ready, device, stop or Stop()).run()
    finally:
        destroy_groups()


class Run:
    """One process of a run. The process groups exist."""

    def __init__(self, config: Config, ready: Preflight, device: torch.device, stop: Stop):
        topology = ready.topology
        self.config, self.topology, self.device, self.task = config, topology, device, ready.task
        self.coordinate = topology.coordinate(ready.launch.rank)
        self.is_main = ready.launch.rank == 0
        self.run_dir = Path(config.training.run_dir)
        self.stop, self.watch = stop, Watch(config.training.hang_minutes, self.run_dir, ready.launch.rank)
        self.progress = Progress(config.training.train_iters, 0, self.is_main)
        self.checkpointer = Checkpointer(config, lambda text: self.progress.log(text), self.watch)
        try:
            self._set_up(ready)
        except BaseException:
            self.checkpointer.close()
            raise

    def _set_up(self, ready: Preflight) -> None:
        config, topology, device = self.config, self.topology, self.device
        self.store = self.checkpointer.store
        checkpoint = self.checkpointer.resume(ready)
        info = checkpoint.info if checkpoint else None
        self.plan = checkpoint.plan() if checkpoint else ready.plan
        initial = InitialWeights(ready.initial, config) if ready.initial and not checkpoint else None
        drawn = config.checkpoint.init_from is None and not (info and info.optimizer_steps is None)  # else trained elsewhere
        self.recovery = Recovery(config.monitor.alarms, self.plan, self.run_dir, info, device, self.is_main, drawn)
        self.position = Position()
        if info:
            self.position = replace(Position.of(info), consumed_samples=self.recovery.consumed_samples(info))
        self._size_data()
        self.fingerprints = self.task.data_fingerprints()
        if initial and (wrong := self.checkpointer.verify(initial.checkpoint)):
            raise UserError(f"checkpoint.init_from {initial.checkpoint.path} is damaged ({wrong}); give another checkpoint.")
        self.engine = Engine(
            config, self.task, self.plan, topology, self.coordinate, device,
            filled=checkpoint.manifest.tensor_files("weights") if checkpoint else initial.filled if initial else (),
            refuses=self.recovery.refuses,
        )
        if checkpoint:
            load_state(self.engine.state, checkpoint)
            if info.optimizer_steps is None:
                self.progress.log(f"{checkpoint.path} has no optimizer state: the optimizer starts anew")
            if changed := data_change(self.task, checkpoint):
                self.progress.log(f"warning: {changed} (checkpoint.allow_data_change)")
        elif initial:
            for line in initial.load(self.engine):
                self.progress.log(line)
        self.total_parameters = self.engine.total_parameters()
        # What lies in the run folder is what was trained: a run that is complete leaves it as it is.
        self.writer = self._make_writer() if self.is_main and self.left else None
        self.saved_iteration = self.attempted_iteration = self.position.iteration if checkpoint else -1
        self.resumed_topology = checkpoint.topology if checkpoint else topology

    def _size_data(self) -> None:
        training = self.config.training
        self.left = max(0, training.train_iters - self.position.iteration) * training.global_batch_size
        self.splits = self.task.splits(self.position.consumed_samples + self.left)

    def _make_writer(self) -> MetricsWriter:
        self.run_dir.mkdir(parents=True, exist_ok=True)
        save_config(self.config, self.run_dir / "config.yaml")
        (self.run_dir / "plan.json").write_text(self.plan.to_json(), encoding="utf-8")
        return MetricsWriter.of_run(self.config, self.plan, self.position.iteration + 1, lambda text: self.progress.log(text))

    def run(self) -> Path:
        """Train to train_iters, validating and saving on the way and at the end."""
        try:
            with Progress(self.config.training.train_iters, self.position.iteration, self.is_main) as self.progress:
                self._announce()
                if self.left:
                    self._run()
                    self._report(self.checkpointer.wait())
                    self._conclude()
        finally:
            self.checkpointer.close()
            if self.writer:
                self.writer.close()
        if self.stop.code:
            self.stop.leave(self.is_main)
        self._require_saved()
        return self.store.path(self.saved_iteration)

    def _require_saved(self) -> None:
        """UserError where the state that the run ends with is not on disk: whoever waits for its exit code must not take it for saved."""
        if self.left and self.saved_iteration != self.position.iteration:
            raise UserError(f"The run ends at iteration {self.position.iteration}, whose state was not saved; the last good checkpoint is "
                            f"{self._last_good()}. Make room, or choose another training.run_dir, and run the same command again.")

    def _last_good(self) -> str:
        return str(self.store.path(self.saved_iteration)) if self.saved_iteration >= 0 else "none: nothing was saved yet"

    def _run(self) -> None:
        self._read_on()
        while self.position.iteration < self.config.training.train_iters:
            self._iteration(self.batches, self.interval)
            if self.stop.agreed(self.device):
                break
        else:
            self._validate(final=True)
        if self.attempted_iteration != self.position.iteration:
            self._save()

    def _read_on(self) -> None:
        """The training data from the position on, and the clock of the log lines."""
        self.batches = self._batches("train", self.position.consumed_samples, self.left, self.config.data.num_workers)
        self.interval = Interval(self.task, self.topology.world_size, self.position.iteration)

    def _iteration(self, batches: Iterator, interval: Interval) -> None:
        training, index = self.config.training, self.position.iteration
        lr = learning_rate(index, self.config.optimizer, training.train_iters)
        with self.watch.during(Phase.STEP):
            result = self.engine.train_step(batches, index, lr, measured=self._measures(index))
        self.position.iteration = done = index + 1
        self.position.consumed_samples += training.global_batch_size
        interval.add(result)
        self._count_skips(result)
        if self.is_main and self.config.checkpoint.on_save_error == "continue" and self.checkpointer.finished():
            self._report(self.checkpointer.wait())
        if self.writer:
            parts = {f"train/{name}": value for name, value in result.parts.items()} if len(result.parts) > 1 else {}
            scores = {} if result.largest_score is None else {"train/max_attention_logit": result.largest_score}
            self.writer.write(done, {
                "train/loss": result.loss, **parts, **scores, "train/lr": lr, "train/grad_norm": result.gradient_norm,
            })
        self.progress.advance(done, result.loss)
        logs = done % self.config.monitor.log_interval == 0 or done == training.train_iters
        saves = self.config.checkpoint.save_interval and done % self.config.checkpoint.save_interval == 0
        # Before a save: a resumed run has seen what this one has seen.
        if index == 0 or logs or saves:
            self._write_signal(self.engine.measuring.read())
        if logs:
            record = interval.record(done, self.position.skipped, result, lr, self.device)
            self.progress.log(record.text())
            if self.writer:
                self.writer.write(done, record.scalars())
                self.writer.flush()
        self.recovery.observe_step(done, result, self.position.first_loss, self.progress, self.writer)
        fine = self.recovery.rollback_wanted(self.checkpointer)
        if fine is not None:
            self._go_back(fine)
            return
        if training.eval_interval and done % training.eval_interval == 0 and done < training.train_iters:
            interval.pause(self._validate)
        if saves:
            # A checkpoint of a model that has just failed would push a good one out.
            if self.position.skipped_in_a_row:
                self.progress.log(f"iteration {done} | not saved, because its step was skipped")
            else:
                interval.pause(self._save)

    def _go_back(self, fine: int) -> None:
        """To the last checkpoint up to iteration `fine`, and on with the data that comes next; on all ranks together."""
        self._report(self.checkpointer.wait())
        checkpoint = self.recovery.go_back(fine, self.position.consumed_samples, self.checkpointer)
        load_state(self.engine.state, checkpoint)
        self.engine.measuring.read()  # of steps that are gone
        self.position = replace(Position.of(checkpoint.info), consumed_samples=self.position.consumed_samples)
        self.saved_iteration = self.attempted_iteration = self.position.iteration
        if self.writer:
            self.writer.close()
            self.writer = self._make_writer()  # what was written since is dropped
        self.progress.log(self.recovery.line())
        if isinstance(self.batches, MicroBatches):
            self.batches.close()
        self._size_data()
        self._read_on()

    def _measures(self, index: int) -> bool:
        """Whether the signal of the step with this index is measured: every so many, the first one always."""
        interval = self.config.monitor.signal_interval
        return bool(interval) and index % interval == 0

    def _write_signal(self, record: SignalRecord | None) -> None:
        if record is None:
            return
        if record.iteration == 0:
            for line in agreement(self.plan, record):
                self.progress.log(line)
        if self.writer:
            self.writer.write_signal(record)
        self.recovery.observe_signal(record, self.progress, self.writer)

    def _count_skips(self, result: StepResult) -> None:
        position = self.position
        if not result.skipped:
            position.skipped_in_a_row, position.loss = 0, result.loss
            position.first_loss = result.loss if position.first_loss is None else position.first_loss
            return
        position.skipped += 1
        position.skipped_in_a_row += 1
        self.progress.log(
            f"iteration {position.iteration}: loss {result.loss}, gradient norm {result.gradient_norm}; step skipped"
            + " (monitor.alarms, action skip)" * result.refused
        )
        if position.skipped_in_a_row >= self.config.training.max_skipped_iterations:
            reason = "refused by an alarm (monitor.alarms, action skip) or not finite" if result.refused else "not finite"
            raise UserError(
                f"{position.skipped_in_a_row} iterations in a row were {reason}, the last one {position.iteration} "
                f"(training.max_skipped_iterations); the last good checkpoint is {self._last_good()}."
            )

    def _validate(self, final: bool = False) -> None:
        training = self.config.training
        if not training.eval_iters:
            return
        # Read in this process: workers would be started anew for every validation.
        batches = self._batches("validation", 0, training.eval_iters * training.global_batch_size, num_workers=0)
        with self.watch.during(Phase.VALIDATION):
            followed = self.watch.following(batches, Phase.VALIDATION)
            result = self.engine.evaluate(followed, training.eval_iters * self.engine.accumulation)
        if self.writer:
            means = {f"validation/{name}": value for name, value in result.means.items()} if len(result.means) > 1 else {}
            self.writer.write(self.position.iteration, {"validation/loss": result.loss, **means})
            self.writer.flush()
        self.progress.log(f"iteration {self.position.iteration} | {self._validation_text(result, final)}")

    def _validation_text(self, result: ValidationResult, final: bool) -> str:
        parts = self.task.loss_parts
        text = f"validation loss {result.loss:.4f}"
        if len(parts) == 1:
            text += f" {parts[0].unit}"
        else:
            text += " = " + " + ".join(f"{part.name.replace('_', ' ')} {result.means[part.name]:.4f} ({part.unit})" for part in parts)
        text += "".join(f" | {name.replace('_', ' ')} {result.means[name]:.4f}" for name in self.task.metric_names)
        note = self.task.validation_note() if final else ""
        return text + (f" ({note})" if note else "")

    def _save(self) -> None:
        self._report(self.checkpointer.wait())
        if self.writer:
            self.writer.save()  # a run that resumes from here keeps the curve up to here
        position = self.position
        info = CheckpointInfo(
            position.iteration, position.consumed_samples, position.skipped, position.loss, self.topology.tensor,
            self.topology.pipeline, self.topology.data, self.config.parallel.zero_stage, self.task.padded_output_size,
            self.task.tokenizer.sha256 if self.task.tokenizer else None, library_versions(), self.engine.state.steps(),
            self.engine.state.loss_scaler(), self.task.name, self.fingerprints, position.first_loss,
            self.recovery.rollbacks, self.recovery.state(),
        )
        self.attempted_iteration = position.iteration
        self._report(self.checkpointer.save(self.engine.state, info, self.plan, self.task.files()))

    def _report(self, result: SaveResult | None) -> None:
        if result is None:
            return
        if result.error is None:
            self.saved_iteration = result.iteration
            self.progress.log(f"iteration {result.iteration} | saved {result.path}")
            return
        sentence = f"checkpoint of iteration {result.iteration} was not saved ({result.error}); the last good one is {self._last_good()}"
        if self.config.checkpoint.on_save_error == "stop":
            raise UserError(f"The {sentence} (checkpoint.on_save_error=stop).")
        self.progress.log(f"error: the {sentence}; training goes on")

    def _batches(self, split: str, consumed_samples: int, num_samples: int, num_workers: int) -> Iterator:
        """This rank's micro-batches; nothing is opened on pipeline stages that read none."""
        if not self.engine.reads_data:
            return iter(())
        training = self.config.training
        return MicroBatches(
            getattr(self.splits, split), consumed_samples=consumed_samples, micro_batch_size=training.micro_batch_size,
            global_batch_size=training.global_batch_size, data_parallel_rank=self.coordinate.data,
            data_parallel_size=self.topology.data, num_workers=num_workers, num_samples=num_samples, collate=self.task.collate,
            pin_memory=self.device.type == "cuda",
        )

    def _conclude(self) -> None:
        """The last line: whether it went as it should."""
        position = self.position
        words = [f"done at iteration {position.iteration}"]
        if position.skipped:
            words.append(f"{position.skipped} iterations were skipped, because they were not finite or an alarm refused them")
        if position.loss is not None and position.first_loss is not None:
            words.append(f"loss {position.first_loss:.4f} -> {position.loss:.4f}")
            if position.loss > position.first_loss:
                words.append("warning: the loss ends above where it began; see megadsl plan, or lower optimizer.lr")
        self.progress.log(" | ".join(words))

    def _announce(self) -> None:
        model = self.config.model
        layers = " + ".join(map(str, model.stack_layers.values()))
        self.progress.log(
            f"{self.task.name}: {layers} layers x {model.hidden_size}, {self.total_parameters:,} parameters, scheme {self.plan.scheme} | "
            f"{self.topology.describe()}, ZeRO {self.config.parallel.zero_stage}, {self.config.training.precision} on {self.device}"
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
