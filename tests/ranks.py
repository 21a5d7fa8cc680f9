"""Run a function on several real gloo processes and collect what each returns."""

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import pickle
import random
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path


def run_ranks(world_size: int, function: Callable, *arguments, timeout: float = 600.0) -> list:
    """Call function(*arguments) in `world_size` processes with torchrun's variables set; the results by rank.

    `function` must be importable (a module-level function). A failure on any rank fails the caller with its traceback.
    """
    context = multiprocessing.get_context("spawn")
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(target=_rank_main, args=(rank, world_size, port, Path(folder), function, arguments))
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        _wait(processes, timeout)
        alive = [process for process in processes if process.is_alive()]
        for process in alive:
            process.kill()
        results = [_result(Path(folder) / f"{rank}.pickle") for rank in range(world_size)]
    failures = [result for ok, result in results if not ok]
    # A rank that has a traceback says more than its peers, who waited for it in vain.
    failures.sort(key=lambda result: "Traceback" not in result)
    assert not failures, failures[0]
    return [result for _, result in results]


def _wait(processes: list, timeout: float) -> None:
    """Until all have ended, or for 30 s after one of them has failed."""
    end, failed_at = time.monotonic() + timeout, None
    while running := [process for process in processes if process.is_alive()]:
        if failed_at is None and any(process.exitcode for process in processes):
            failed_at = time.monotonic()
            end = min(end, failed_at + 30)
        left = end - time.monotonic()
        if left <= 0:
            return
        multiprocessing.connection.wait([process.sentinel for process in running], timeout=min(left, 5))


def free_port() -> int:
    """A port that nobody listens on, below those that the system gives to outgoing connections: it may be used minutes later."""
    while True:
        port = random.SystemRandom().randrange(10_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def _rank_main(rank: int, world_size: int, port: int, folder: Path, function: Callable, arguments: tuple) -> None:
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    try:
        outcome = (True, function(*arguments))
    except BaseException:
        outcome = (False, f"rank {rank}:\n{traceback.format_exc()}")
    (folder / f"{rank}.pickle").write_bytes(pickle.dumps(outcome))
    if not outcome[0]:
        sys.exit(1)  # its peers must not wait for it


def _result(path: Path) -> tuple[bool, object]:
    return pickle.loads(path.read_bytes()) if path.exists() else (False, f"rank {path.stem} ended without a result")


def train_each(configs: list) -> None:
    """Train one after the other, on one rank."""
    from megadsl.tasks.registry import resolved
    from megadsl.training.loop import train

    for config in configs:
        train(resolved(config))


class ForkServer:
    """Processes that start in milliseconds: forked from one that has torch, DeepSpeed and Megatron imported.

    `start` gives the process ids, so that a test can kill them; `results` waits and gives what each rank returned, or None for
    one that was killed.
    """

    def __enter__(self) -> "ForkServer":
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs,))
        self._process.start()
        theirs.close()
        return self

    def __exit__(self, *exception) -> None:
        self._pipe.send(None)
        self._process.join(20)
        if self._process.is_alive():
            self._process.kill()

    def start(self, world_size: int, function: Callable, *arguments) -> list[int]:
        self._pipe.send((world_size, function, arguments))
        return self._pipe.recv()

    def results(self) -> list:
        results = self._pipe.recv()
        failures = [result for ok, result in results if not ok and result is not None]
        assert not failures, failures[0]
        return [result for _, result in results]

    def run(self, world_size: int, function: Callable, *arguments) -> list:
        self.start(world_size, function, *arguments)
        return self.results()


def _serve(pipe) -> None:
    import megadsl.training.loop  # noqa: F401
    from megadsl.parallel.device import prepare_deepspeed, prepare_device

    prepare_deepspeed(prepare_device("cpu"))

    while (job := pipe.recv()) is not None:
        world_size, function, arguments = job
        port = free_port()
        with tempfile.TemporaryDirectory() as folder:
            children = []
            for rank in range(world_size):
                child = os.fork()
                if child == 0:
                    try:
                        _rank_main(rank, world_size, port, Path(folder), function, arguments)
                    finally:
                        os._exit(0)
                children.append(child)
            pipe.send(children)
            killed = [os.waitpid(child, 0)[1] != 0 for child in children]
            pipe.send([
                (False, None) if dead and not (Path(folder) / f"{rank}.pickle").exists() else _result(Path(folder) / f"{rank}.pickle")
                for rank, dead in enumerate(killed)
            ])
    os._exit(0)  # what the libraries do at exit takes seconds
