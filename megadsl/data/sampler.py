"""(consumed_samples) -> which samples each rank reads next, and an iterator that reads them ahead.

A global batch is the next `global_batch_size` samples, cut into micro-batches of consecutive ones; micro-batch m goes to
data-parallel rank m mod size. So a micro-batch holds the same samples whatever the number of ranks.
Shape letters: b micro-batch, s sequence.
"""

import atexit
import signal
import weakref
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch.utils.data import DataLoader, Dataset

Sample = dict[str, torch.Tensor]

_PREFETCHED_MICRO_BATCHES = 4
_SCHEDULER_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


def batch_indices(
    consumed_samples: int, micro_batch_size: int, global_batch_size: int, data_parallel_rank: int, data_parallel_size: int,
) -> list[list[int]]:
    """The sample indices of each micro-batch of this rank, for the global batch that starts at `consumed_samples`."""
    if global_batch_size % (micro_batch_size * data_parallel_size):
        raise ValueError(
            f"global_batch_size {global_batch_size} is not divisible by micro_batch_size {micro_batch_size} x "
            f"{data_parallel_size} data-parallel ranks"
        )
    starts = range(consumed_samples, consumed_samples + global_batch_size, micro_batch_size)
    return [list(range(start, start + micro_batch_size)) for start in starts[data_parallel_rank::data_parallel_size]]


class MicroBatches:
    """Iterator over this rank's micro-batches {"tokens": [b, s], ...} on CPU, from `consumed_samples` on.

    With `num_samples` it ends after that many samples (over all ranks), else with the dataset, which may be never.
    `num_workers` processes read ahead; 0 reads in this one. The order is the same, and torch's default random generator
    is not touched. `collate` makes a micro-batch of samples (default: it stacks them); `pin_memory` for copies to a GPU.
    """

    def __init__(
        self, dataset: Dataset, *, consumed_samples: int, micro_batch_size: int, global_batch_size: int,
        data_parallel_rank: int = 0, data_parallel_size: int = 1, num_workers: int = 0, num_samples: int | None = None,
        collate: Callable[[list[Sample]], Sample] | None = None, pin_memory: bool = False,
    ):
        end = len(dataset) if num_samples is None else consumed_samples + num_samples
        order = _Order(consumed_samples, end, (micro_batch_size, global_batch_size, data_parallel_rank, data_parallel_size))
        ahead = {"prefetch_factor": _PREFETCHED_MICRO_BATCHES, "multiprocessing_context": "fork"} if num_workers else {}
        # Without a generator of its own the loader draws a seed from the default one, which dropout shares.
        loader = DataLoader(
            dataset, batch_sampler=order, num_workers=num_workers, collate_fn=collate or _stack, generator=torch.Generator(),
            worker_init_fn=_ignore_signals, pin_memory=pin_memory, **ahead,
        )
        # Blocked until the readers ignore them (_ignore_signals): a signal in between would kill a reader.
        previous = signal.pthread_sigmask(signal.SIG_BLOCK, _SCHEDULER_SIGNALS if num_workers else ())
        try:
            self._iterator = iter(loader)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, previous)
        # Python ends its child processes at exit with SIGTERM and waits; our readers ignore that, so they are told before.
        self._at_exit = partial(_close, weakref.ref(self))
        atexit.register(self._at_exit)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        return self

    def __next__(self) -> dict[str, torch.Tensor]:
        try:
            return next(self._iterator)
        except StopIteration:
            self.close()
            raise

    def close(self) -> None:
        """Stop the readers now instead of when the iterator is collected."""
        atexit.unregister(self._at_exit)
        # Dropping the iterator would do, but the traceback of an error may hold it for as long as the process lives.
        shutdown = getattr(self._iterator, "_shutdown_workers", None)
        self._iterator = iter(())
        if shutdown:
            shutdown()


class _Order:
    """The micro-batches of one rank as the batch sampler that DataLoader expects."""

    def __init__(self, start: int, end: int, layout: tuple[int, int, int, int]):
        self._start, self._end, self._layout = start, end, layout

    def __iter__(self) -> Iterator[list[int]]:
        global_batch_size = self._layout[1]
        for consumed in range(self._start, self._end - global_batch_size + 1, global_batch_size):
            yield from batch_indices(consumed, *self._layout)


def _stack(samples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {key: torch.stack([sample[key] for sample in samples]) for key in samples[0]}


def _close(reference: "weakref.ref[MicroBatches]") -> None:
    batches = reference()
    if batches is not None:
        batches.close()


def _ignore_signals(_worker: int) -> None:
    # A scheduler sends its warning to every process of a step; only the training process shall act on it.
    for number in _SCHEDULER_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SCHEDULER_SIGNALS)
