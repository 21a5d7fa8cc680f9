"""A map over worker processes that keeps the order of its items and never runs far ahead of its reader."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context

from megadsl.errors import UserError

# Items under way per worker: enough to keep all busy, few enough that a large corpus never piles up in memory.
_AHEAD = 3


@contextmanager
def ordered_map(workers: int) -> Iterator[Callable[[Callable, Iterable], Iterator]]:
    """map(function, items) in order, over `workers` processes."""
    if workers <= 1:
        yield map
        return
    # fork: a fresh interpreter would import torch and Megatron first (4 s), which no worker needs.
    with ProcessPoolExecutor(workers, mp_context=get_context("fork")) as pool:

        def ordered(function: Callable, items: Iterable) -> Iterator:
            ahead = deque()
            for item in items:
                ahead.append(pool.submit(function, item))
                if len(ahead) >= workers * _AHEAD:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()

        try:
            yield ordered
        except BrokenProcessPool as error:
            raise UserError("A preprocessing worker was killed (out of memory?); try again with fewer --workers.") from error
