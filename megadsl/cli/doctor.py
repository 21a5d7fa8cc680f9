"""`megadsl doctor`: is this machine, or every node of this job, fit to train? One table, and exit code 1 where something is wrong.

Under srun, torchrun, deepspeed or mpirun each node checks itself, the ranks check what lies between them, and rank 0 speaks.
"""

import os
import platform
import re
import resource
import shutil
import subprocess
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import typer

LIBRARIES = ("torch", "deepspeed", "megatron-core", "sentencepiece", "numpy", "mpi4py", "pydantic", "tensorboard")
_SLURM_FACTS = ("SLURM_VERSION", "ClusterName", "JobRequeue", "PreemptMode", "KillWait", "MpiDefault", "AccountingStorageType")


def doctor(folder: Path = typer.Option(Path("."), help="where runs will lie: its file system is checked")) -> None:
    """Check versions, devices, links between ranks, the file system, SLURM and DeepSpeed's ops; exit code 1: something is wrong."""
    from megadsl.parallel.check import Finding, Ranks, check_communication, check_deepspeed_ops, node_name
    from megadsl.parallel.device import prepare_device
    from megadsl.parallel.launch import discover_launch

    launch = discover_launch()
    device = prepare_device("auto", launch.local_rank)
    from megadsl.checkpoint.file_system import check_file_system

    ranks = Ranks(launch, device)
    try:
        of_node = []
        hosts = ranks.gather(node_name())
        if hosts.index(hosts[ranks.rank]) == ranks.rank:
            rows = [*_versions(), *_devices(device, hosts.count(hosts[ranks.rank])), *_slurm()]
            of_node = [Finding(*row) for row in rows] + check_deepspeed_ops(device)
        common = check_communication(ranks, launch.launcher) + check_file_system(folder, ranks)
        table = _merge(list(zip(hosts, ranks.gather(of_node), strict=True)), common)
    finally:
        ranks.close()
    if launch.rank == 0:
        _print(table)
    if any(finding.problem for _, finding in table):
        raise typer.Exit(1)


def _merge(per_rank: list[tuple[str, list]], common: list) -> list[tuple[str, object]]:
    """(nodes it holds on, finding): what all nodes share is one row; rows of a topic stay together."""
    where: dict[object, list[str]] = {}
    for host, findings in per_rank:
        for finding in findings:
            where.setdefault(finding, []).append(host)
    nodes = {host for host, _ in per_rank}
    topics = list(dict.fromkeys(finding.topic for finding in where))
    rows = sorted(where.items(), key=lambda row: topics.index(row[0].topic))
    merged = [("" if set(hosts) == nodes else ", ".join(hosts), finding) for finding, hosts in rows]
    different = {topic for topic in LIBRARIES if len({finding.text for finding in where if finding.topic == topic}) > 1}
    if different:
        from megadsl.parallel.check import Finding

        names = ", ".join(sorted(different))
        merged.append(("", Finding("nodes differ", names, f"{names} differ between nodes; give all of them one environment.")))
    return merged + [("", finding) for finding in common]


def _print(table: list[tuple[str, object]]) -> None:
    width = max(len(finding.topic) for _, finding in table)
    for where, finding in table:
        mark = "WRONG" if finding.problem else "ok"
        print(f"{mark:<6}{finding.topic:<{width}}  {finding.text}{f'  [{where}]' if where else ''}")
        if finding.problem:
            print(f"{'':<6}{'':<{width}}  -> {finding.problem}")
    wrong = sum(bool(finding.problem) for _, finding in table)
    print(f"{wrong} thing(s) to put right." if wrong else "Nothing is wrong.", flush=True)


def _versions() -> Iterator[tuple[str, ...]]:
    yield "python", platform.python_version()
    for library in LIBRARIES:
        yield library, _version(library) or "not installed"
    conflicts = sorted(_conflicts("megadsl"))
    if conflicts:
        wanted = " ".join(f"'{requirement}'" for _, requirement, _ in conflicts)
        for owner, requirement, version in conflicts:
            yield "requirements", f"{owner} wants {requirement}", f"{version or 'nothing'} is installed; pip install {wanted}"
    else:
        yield "requirements", "those of megadsl and of all that it needs are met"


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _conflicts(root: str) -> Iterator[tuple[str, str, str | None]]:
    """(owner, requirement, installed version) of every requirement that is not met, through all dependencies of `root`."""
    from packaging.requirements import Requirement

    seen, ahead = set(), [(root, frozenset([""]))]
    while ahead:
        owner, extras = ahead.pop()
        if (owner, extras) in seen:
            continue
        seen.add((owner, extras))
        for line in metadata.requires(owner) or ():
            requirement = Requirement(line)
            if requirement.marker and not any(requirement.marker.evaluate({"extra": extra}) for extra in extras):
                continue
            version = _version(requirement.name)
            if version is None or not requirement.specifier.contains(version, prereleases=True):
                yield owner, f"{requirement.name}{requirement.specifier}", version
            else:
                ahead.append((requirement.name, frozenset(requirement.extras) | {""}))


def _devices(device, processes: int) -> Iterator[tuple[str, ...]]:
    import torch

    cores = len(os.sched_getaffinity(0))
    threads = torch.get_num_threads()
    problem = ""
    if processes * threads > cores and processes > 1:
        problem = f"{processes} processes of {threads} threads each share {cores} cores; set OMP_NUM_THREADS={max(1, cores // processes)}."
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    yield "CPU", f"{_processor()}, {cores} cores for {processes} process(es) of {threads} threads, {memory:.0f} GiB", problem
    shared = shutil.disk_usage("/dev/shm").total / 2**30
    small = "" if shared >= 0.25 else "data readers and NCCL need more; start the container with --shm-size=8g or --ipc=host."
    yield "/dev/shm", f"{shared:.1f} GiB", small
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    yield "open files", str(files), "" if files >= 1024 else "raise it with ulimit -n 65536 in slurm/cluster.env."
    if device.type == "cuda":
        count = torch.cuda.device_count()
        names = {torch.cuda.get_device_name(index) for index in range(count)}
        crowd = "" if processes <= count else f"{processes} processes share {count} GPUs; start one task for each GPU."
        yield "GPUs", f"{count} x {', '.join(sorted(names))}, CUDA {torch.version.cuda}, NCCL {torch.cuda.nccl.version()}", crowd
        old = "" if torch.cuda.is_bf16_supported() else "set training.precision=fp16."
        yield "bf16", "supported" if not old else "not supported", old
    elif shutil.which("nvidia-smi") and subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True).stdout.strip():
        reason = "torch was built without CUDA" if torch.version.cuda is None else f"the driver is older than CUDA {torch.version.cuda}"
        yield "GPUs", "there are some, but torch does not see them", f"{reason}; install the build of torch that fits the driver."
    else:
        yield "GPUs", "none; training runs on the CPU (gloo)"


def _processor() -> str:
    name = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
    return name.group(1) if name else platform.machine()


def _slurm() -> Iterator[tuple[str, ...]]:
    if not shutil.which("scontrol"):
        yield "SLURM", "not on this machine"
        return
    done = subprocess.run(["scontrol", "show", "config"], capture_output=True, text=True, timeout=60)
    inside = "SLURM_JOB_ID" in os.environ
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no answer"])[-1]
        way_out = f"{reason}; see that slurmctld runs and SLURM_CONF names its configuration." if inside else ""
        yield "SLURM", "its programs are here, but no controller answers", way_out
        return
    facts = dict(re.findall(r"^(\w+)\s+= (.*)$", done.stdout, flags=re.M))
    yield "SLURM", ", ".join(f"{name}={facts[name]}" for name in _SLURM_FACTS if name in facts)
    if facts.get("JobRequeue") == "0":
        yield "requeue", "off for this cluster", "set MEGADSL_REQUEUE=exit in slurm/cluster.env, and submit again what was preempted."
    if inside:
        names = ("SLURM_JOB_ID", "SLURM_NNODES", "SLURM_NTASKS", "SLURM_CPUS_PER_TASK", "SLURM_GPUS_ON_NODE", "SLURM_RESTART_COUNT")
        yield "job", ", ".join(f"{name[6:].lower()} {os.environ[name]}" for name in names if name in os.environ)
