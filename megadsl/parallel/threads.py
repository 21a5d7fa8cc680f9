"""Compute threads of this process: how many, and that they sleep while they wait. One rule for every command.

torch's CPU build computes with GNU OpenMP (its own libgomp), whose threads spin between two regions for about a millisecond
before they sleep. Spinning gains where every thread has a core to itself; where another process wants the core, it takes the
time of just that process, and of the thread that all wait for (benchmarks/threads_beside_load.py: many times slower).

libgomp reads its variables once, when torch is loaded. So this runs at the console entry, before any verb imports torch, and
nothing here may import it.
"""

import math
import os
import re
from pathlib import Path

_CGROUPS = Path("/sys/fs/cgroup")
# How many processes share this node, by whoever started them: torchrun, deepspeed, Open MPI, MPICH and Intel MPI.
_LOCAL_SIZES = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS")


def set_threads(threads: int | None = None) -> None:
    """Set the variables by which OpenMP and MKL size and pace their threads.

    Args:
        threads: what the user asked for; None: OMP_NUM_THREADS where it is set (torchrun sets 1), else the share of this
            process in the cores that it may use.
    """
    if threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(threads)
        os.environ.pop("MKL_NUM_THREADS", None)  # it would win over the above in matrix products
    else:
        os.environ.setdefault("OMP_NUM_THREADS", str(threads_per_process()))
    # GOMP_SPINCOUNT and KMP_BLOCKTIME say the same in the words of one runtime (GNU, LLVM/Intel); who sets one knows why.
    if "GOMP_SPINCOUNT" not in os.environ and "KMP_BLOCKTIME" not in os.environ:
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def threads_per_process() -> int:
    """The cores of this process: those it may use, shared out over the processes of this node."""
    cores = usable_cores()
    if "SLURM_STEP_NUM_TASKS" in os.environ and "LOCAL_WORLD_SIZE" not in os.environ:
        # A task of srun was promised cores of its own, bound to them or not.
        own = _positive(os.environ.get("SLURM_CPUS_PER_TASK"))
        if own:
            return min(cores, own)
    return max(1, cores // local_processes())


def usable_cores() -> int:
    """Cores that the affinity mask, the cgroup's quota and the SLURM allocation leave to this process; at least one.

    Two hardware threads of one core count once: matrix products gain nothing from the second.
    """
    cpus = os.sched_getaffinity(0)
    limits = [len({_core_of(cpu) for cpu in cpus}), _cgroup_quota(), _positive(os.environ.get("SLURM_CPUS_ON_NODE"))]
    return max(1, min(limit for limit in limits if limit))


def local_processes() -> int:
    """Processes of this run on this node, as the innermost launcher tells; 1 where none does."""
    for name in _LOCAL_SIZES:
        if size := _positive(os.environ.get(name)):
            return size
    if "SLURM_STEP_NUM_TASKS" in os.environ:
        return _slurm_tasks_on_node(os.environ.get("SLURM_STEP_TASKS_PER_NODE", ""), os.environ.get("SLURM_NODEID", ""))
    # RANK and WORLD_SIZE set by hand.
    here = os.environ.get("MASTER_ADDR") in ("127.0.0.1", "localhost")
    return _positive(os.environ.get("WORLD_SIZE")) or 1 if here else 1


def _slurm_tasks_on_node(tasks_per_node: str, node: str) -> int:
    """`4(x2),3` is 4, 4, 3 tasks on nodes 0, 1, 2."""
    counts = []
    for tasks, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", tasks_per_node):
        counts += [int(tasks)] * int(times or 1)
    return max(1, counts[int(node)]) if node.isdecimal() and int(node) < len(counts) else 1


def _core_of(cpu: int) -> str:
    siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
    return siblings.read_text(encoding="ascii").strip() if siblings.is_file() else str(cpu)


def _cgroup_quota(own: Path = Path("/proc/self/cgroup")) -> int | None:
    """Whole cores' worth of time that the tightest cgroup around this process grants; None without a quota."""
    quotas = []
    for line in own.read_text(encoding="utf-8").splitlines() if own.is_file() else []:
        _, controllers, path = line.split(":", 2)
        names = controllers.split(",")
        if controllers and "cpu" not in names:
            continue
        # Version 2 has one tree; version 1 one for each controller. In a container its root is the cgroup itself.
        root = _CGROUPS / controllers if controllers else _CGROUPS
        inner = root / path.lstrip("/")
        quotas += [_quota_of(folder) for folder in (inner, *inner.parents) if folder.is_relative_to(root)]
    granted = [quota for quota in quotas if quota is not None]
    return max(1, math.ceil(min(granted))) if granted else None


def _quota_of(folder: Path) -> float | None:
    """CPU time over wall time of one cgroup folder, of either version."""
    if (both := folder / "cpu.max").is_file():
        quota, period = both.read_text(encoding="ascii").split()
    elif (first := folder / "cpu.cfs_quota_us").is_file():
        quota, period = first.read_text(encoding="ascii"), (folder / "cpu.cfs_period_us").read_text(encoding="ascii")
    else:
        return None
    return None if quota == "max" or int(quota) <= 0 else int(quota) / int(period)


def _positive(text: str | None) -> int | None:
    return int(text) if text and text.isdecimal() and int(text) else None
