"""Links between ranks: one address book, agreeing clocks, and a sweep of all-reduces over sizes.

Bus bandwidth is that of NCCL's tests: 2 (n-1)/n * bytes / seconds, the traffic on every rank's link whatever the number n.
"""

import time

import torch
import torch.distributed as dist

from megadsl.parallel.checks.findings import Finding, Ranks, node_name

# (bytes, repetitions): latency shows in the first, bandwidth in the last.
_SWEEP = ((8, 200), (64 * 2**10, 50), (2**20, 20), (16 * 2**20, 5))
# Below these (GB/s) a run crawls; a loopback or a gigabit link is faster.
_LEAST_BANDWIDTH = {"gloo": 0.02, "nccl": 0.5}


def check_communication(ranks: Ranks, launcher: str) -> list[Finding]:
    """Who takes part, whether their clocks agree, and how fast an all-reduce is; equal on all ranks."""
    nodes = ranks.gather(node_name())
    if ranks.size == 1:
        text = "one process; start the doctor as you will start training (srun, torchrun, mpirun) to measure what lies between ranks"
        return [Finding("ranks", text)]
    ranks.barrier()
    clocks = ranks.gather(time.time())
    spread, problem = max(clocks) - min(clocks), ""
    if spread > 2:
        problem = f"the clocks of the nodes differ by {spread:.1f} s; start a time service (chrony) on {nodes[clocks.index(min(clocks))]}."
    found = [Finding("ranks", f"{ranks.size} processes on {', '.join(dict.fromkeys(nodes))} by {launcher}, {ranks.backend}", problem)]
    return found + [_all_reduce(ranks, size, repetitions) for size, repetitions in _SWEEP]


def _all_reduce(ranks: Ranks, size: int, repetitions: int) -> Finding:
    values = torch.full((size // 4,), float(ranks.rank + 1), device=ranks.device)
    dist.all_reduce(values)
    wrong = not bool((values == ranks.size * (ranks.size + 1) / 2).all())
    values.zero_()
    _synchronize(ranks)
    begun = time.perf_counter()
    for _ in range(repetitions):
        dist.all_reduce(values)
    _synchronize(ranks)
    seconds = max(ranks.gather((time.perf_counter() - begun) / repetitions))
    bandwidth = 2 * (ranks.size - 1) / ranks.size * size / seconds / 1e9
    problem = ""
    if any(ranks.gather(wrong)):
        problem = "the sum is wrong on some rank: a broken link or driver; leave nodes out until it is right."
    elif size == _SWEEP[-1][0] and bandwidth < _LEAST_BANDWIDTH[ranks.backend]:
        problem = (
            f"{bandwidth:.3f} GB/s is less than an old network gives; name the fast interface in slurm/cluster.env "
            "(NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME), and see that fewer processes than cores compute."
        )
    return Finding(f"all-reduce {_size(size)}", f"{seconds * 1e6:,.0f} us, bus bandwidth {bandwidth:.3g} GB/s", problem)


def _synchronize(ranks: Ranks) -> None:
    if ranks.device.type == "cuda":
        torch.cuda.synchronize(ranks.device)
    ranks.barrier()


def _size(size: int) -> str:
    return f"{size} B" if size < 2**10 else f"{size // 2**10} KiB" if size < 2**20 else f"{size // 2**20} MiB"
