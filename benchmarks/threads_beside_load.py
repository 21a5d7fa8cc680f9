"""What OpenMP's waiting costs beside other work: forward passes of a deep, narrow model, alone and beside a busy core.

    python benchmarks/threads_beside_load.py --layers 48 --rounds 5

Every way of waiting runs in a process of its own (libgomp reads its variables once); the processes take turns, each pausing
(SIGSTOP) while another is timed, so that load from elsewhere falls on all of them alike. Printed: median and range over rounds of
the time of a pass, divided by that of one thread in the same round. Threads in all but the first: what megadsl chooses here.
"""

import argparse
import os
import signal
import statistics
import subprocess
import sys
import time

from megadsl.parallel.threads import threads_per_process

SINGLE = "1 thread"


def ways(threads: int) -> dict[str, dict[str, str]]:
    return {
        SINGLE: {"OMP_NUM_THREADS": "1"},
        f"{threads} threads, spinning (libgomp's default)": {"OMP_NUM_THREADS": str(threads)},
        f"{threads} threads, GOMP_SPINCOUNT=10000": {"OMP_NUM_THREADS": str(threads), "GOMP_SPINCOUNT": "10000"},
        f"{threads} threads, GOMP_SPINCOUNT=1000": {"OMP_NUM_THREADS": str(threads), "GOMP_SPINCOUNT": "1000"},
        f"{threads} threads, passive (megadsl)": {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "passive"},
    }


def serve(layers: int, hidden: int, seq_length: int, batch: int) -> None:
    """For each line on stdin, one forward pass and its seconds on stdout."""
    import torch

    from megadsl.config.load import parse_config
    from megadsl.model.init import initialize
    from megadsl.model.stack import SequentialModel
    from megadsl.parallel.device import prepare_device
    from megadsl.parallel.groups import initialize_groups
    from megadsl.parallel.launch import Launch
    from megadsl.parallel.topology import Topology
    from megadsl.tasks.planning import plan_for_run
    from megadsl.tasks.registry import task_of

    initialize_groups(Launch.alone(), Topology(1, 1, 1), prepare_device("cpu"))
    config = parse_config({"model": {
        "num_layers": layers, "hidden_size": hidden, "num_attention_heads": max(1, hidden // 64), "seq_length": seq_length,
    }})
    model = SequentialModel(task_of(config).define_model(plan_for_run(config), 2048).entries).eval()
    initialize(model.canonical_parameters(), 1, 0, 1)
    tokens = torch.randint(0, 2048, (batch, seq_length), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        model({"tokens": tokens})
        print("ready", flush=True)
        for _ in sys.stdin:
            begun = time.perf_counter()
            model({"tokens": tokens})
            print(time.perf_counter() - begun, flush=True)


class Worker:
    """A process that times passes on demand, stopped in between: a sleeping thread pool disturbs nobody, a spinning one would."""

    def __init__(self, environment: dict[str, str], shape: list[str]):
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_", "KMP_", "MKL_"))}
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", __file__, "--serve", *shape], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=clean | environment,
        )
        if self._process.stdout.readline() != "ready\n":
            sys.exit("a worker did not start")
        self._process.send_signal(signal.SIGSTOP)

    def seconds(self, passes: int) -> float:
        self._process.send_signal(signal.SIGCONT)
        total = 0.0
        for _ in range(passes):
            self._process.stdin.write("\n")
            self._process.stdin.flush()
            total += float(self._process.stdout.readline())
        self._process.send_signal(signal.SIGSTOP)
        return total / passes

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


def measure(workers: dict[str, Worker], rounds: int, passes: int, busy: bool) -> None:
    load = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if busy else None
    try:
        seconds = [{name: worker.seconds(passes) for name, worker in workers.items()} for _ in range(rounds)]
    finally:
        if load:
            load.kill()
            load.wait()
    print(f"\n{'beside a busy core' if busy else 'alone'}: time of a pass over that of one thread, which takes "
          f"{statistics.median(row[SINGLE] for row in seconds):.2f} s", flush=True)
    for name in workers:
        ratios = [row[name] / row[SINGLE] for row in seconds]
        print(f"  {name:<45} {statistics.median(ratios):6.2f}  ({min(ratios):.2f} to {max(ratios):.2f})", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=192)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--seq-length", type=int, default=128)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--passes", type=int, default=1, help="of each worker in each round")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.layers, options.hidden, options.seq_length, options.batch)
        return
    shape = [f"--{name}={getattr(options, name.replace('-', '_'))}" for name in ("layers", "hidden", "seq-length", "batch")]
    threads = max(2, threads_per_process())
    workers: dict[str, Worker] = {}
    try:
        for name, environment in ways(threads).items():
            workers[name] = Worker(environment, shape)
        load = os.getloadavg()[0]
        print(f"{options.layers} x {options.hidden}, {options.batch} x {options.seq_length} tokens a pass, {options.rounds} rounds; "
              f"{threads_per_process()} cores, load of the machine at the start {load:.1f}")
        for busy in (False, True):
            measure(workers, options.rounds, options.passes, busy)
    finally:
        for worker in workers.values():
            worker.close()


if __name__ == "__main__":
    main()
