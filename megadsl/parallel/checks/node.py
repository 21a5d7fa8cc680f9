"""This node: cores and threads, memory, GPUs, and the SLURM that it belongs to."""

import os
import platform
import re
import resource
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from megadsl.parallel.checks.findings import Finding

_SLURM_FACTS = ("SLURM_VERSION", "ClusterName", "JobRequeue", "PreemptMode", "KillWait", "MpiDefault", "AccountingStorageType")


def check_devices(device: torch.device, gpus: Sequence[str]) -> Iterator[Finding]:
    """CPU, shared memory, open files and GPUs of a node; `gpus` says of each of its ranks which GPU it holds (gpu_identity)."""
    processes = len(gpus)
    cores = len(os.sched_getaffinity(0))
    threads = torch.get_num_threads()
    problem = ""
    if processes * threads > cores and processes > 1:
        problem = f"{processes} processes of {threads} threads each share {cores} cores; set OMP_NUM_THREADS={max(1, cores // processes)}."
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    yield Finding("CPU", f"{_processor()}, {cores} cores for {processes} process(es) of {threads} threads, {memory:.0f} GiB", problem)
    shared = shutil.disk_usage("/dev/shm").total / 2**30
    small = "" if shared >= 0.25 else "data readers and NCCL need more; start the container with --shm-size=8g or --ipc=host."
    yield Finding("/dev/shm", f"{shared:.1f} GiB", small)
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    yield Finding("open files", str(files), "" if files >= 1024 else "raise it with ulimit -n 65536 in slurm/cluster.env.")
    if device.type == "cuda":
        count = torch.cuda.device_count()
        names = {torch.cuda.get_device_name(index) for index in range(count)}
        yield Finding("GPUs", f"{count} x {', '.join(sorted(names))}, CUDA {torch.version.cuda}, NCCL {torch.cuda.nccl.version()}", _crowd(gpus))
        old = "" if torch.cuda.is_bf16_supported() else "set training.precision=fp16."
        yield Finding("bf16", "supported" if not old else "not supported", old)
    elif shutil.which("nvidia-smi") and subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True).stdout.strip():
        reason = "torch was built without CUDA" if torch.version.cuda is None else f"the driver is older than CUDA {torch.version.cuda}"
        yield Finding("GPUs", "there are some, but torch does not see them", f"{reason}; install the build of torch that fits the driver.")
    else:
        yield Finding("GPUs", "none; training runs on the CPU (gloo)")


def _crowd(gpus: Sequence[str]) -> str:
    # Counted by what the ranks hold, not by what one of them sees: that may be its own GPU alone (srun --gpus-per-task=1).
    used = len(set(gpus))
    return "" if used == len(gpus) else f"{len(gpus)} processes share {used} GPUs; start one task for each GPU."


def _processor() -> str:
    name = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
    return name.group(1) if name else platform.machine()


def check_slurm() -> Iterator[Finding]:
    """The cluster's settings that a run depends on, and this job."""
    if not shutil.which("scontrol"):
        yield Finding("SLURM", "not on this machine")
        return
    done = subprocess.run(["scontrol", "show", "config"], capture_output=True, text=True, timeout=60)
    inside = "SLURM_JOB_ID" in os.environ
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no answer"])[-1]
        way_out = f"{reason}; see that slurmctld runs and SLURM_CONF names its configuration." if inside else ""
        yield Finding("SLURM", "its programs are here, but no controller answers", way_out)
        return
    facts = dict(re.findall(r"^(\w+)\s+= (.*)$", done.stdout, flags=re.M))
    yield Finding("SLURM", ", ".join(f"{name}={facts[name]}" for name in _SLURM_FACTS if name in facts))
    if facts.get("JobRequeue") == "0":
        yield Finding("requeue", "off for this cluster", "set MEGADSL_REQUEUE=exit in slurm/cluster.env, and submit again what was preempted.")
    if inside:
        names = ("SLURM_JOB_ID", "SLURM_NNODES", "SLURM_NTASKS", "SLURM_CPUS_PER_TASK", "SLURM_GPUS_ON_NODE", "SLURM_RESTART_COUNT")
        yield Finding("job", ", ".join(f"{name[6:].lower()} {os.environ[name]}" for name in names if name in os.environ))
