"""What a log line says: means and rates over the iterations since the last one; time spent validating and saving is not counted."""

import time
from collections.abc import Callable

import torch

from megadsl.model.flops import training_flops
from megadsl.monitor.device_peak import peak_tflops
from megadsl.monitor.progress import LogRecord
from megadsl.parallel.device import device_name, peak_memory_bytes
from megadsl.parallel.groups import largest_over_ranks
from megadsl.tasks.task import Task
from megadsl.training.engine import StepResult


class Interval:
    """Sums since the last log line."""

    def __init__(self, task: Task, world_size: int, iteration: int):
        config = task.config
        self._train_iters, self._precision = config.training.train_iters, config.training.precision
        self._flops = config.training.global_batch_size * training_flops(task.model, task.head_multiplications())
        self._world_size = world_size
        self._start(iteration)

    def _start(self, iteration: int) -> None:
        self._iteration, self._started = iteration, time.perf_counter()
        self._loss = self._finite = self._tokens = self._positions = 0.0

    def pause(self, work: Callable[[], None]) -> None:
        """Run `work` off the clock."""
        begun = time.perf_counter()
        work()
        self._started += time.perf_counter() - begun

    def add(self, result: StepResult) -> None:
        """Count one iteration; the loss of one that was not finite is left out of the mean."""
        self._tokens += result.tokens
        self._positions += result.positions
        if not result.skipped:
            self._loss += result.loss
            self._finite += 1

    def record(self, iteration: int, skipped: int, result: StepResult, lr: float, device: torch.device) -> LogRecord:
        """The log line for the interval that ends now, on all ranks together; starts the next one."""
        iterations = iteration - self._iteration
        seconds = (time.perf_counter() - self._started) / iterations
        record = LogRecord(
            iteration=iteration, train_iters=self._train_iters, loss=self._loss / self._finite if self._finite else result.loss, lr=lr,
            gradient_norm=result.gradient_norm, tokens_per_second=self._tokens / iterations / seconds,
            padding=1.0 - self._tokens / max(1.0, self._positions), tflops=self._flops / seconds / self._world_size / 1e12,
            memory_bytes=largest_over_ranks(peak_memory_bytes(device), device), seconds_per_iteration=seconds,
            skipped=skipped, peak_tflops=peak_tflops(device_name(device), self._precision),
        )
        self._start(iteration)
        return record
