"""Threads of a process: its share of the cores it may use, whoever started it; what the user says comes first; none of them spins."""

import os
import re
import subprocess
import sys

import pytest

from megadsl.parallel import threads
from megadsl.parallel.threads import _quota_of, _slurm_tasks_on_node, local_processes, threads_per_process, usable_cores

NAMES = re.compile(r"(OMP_|MKL_|GOMP_|KMP_|SLURM_|MPI_|LOCAL_|(RANK|WORLD_SIZE|MASTER_ADDR)$)")
STEP = {"SLURM_STEP_NUM_TASKS": "7", "SLURM_STEP_TASKS_PER_NODE": "3(x2),1", "SLURM_NODEID": "1"}


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in [name for name in os.environ if NAMES.match(name)]:
        monkeypatch.delenv(name)


@pytest.mark.parametrize("environment, processes", [
    ({}, 1),
    ({"LOCAL_WORLD_SIZE": "4", "WORLD_SIZE": "8"}, 4),  # torchrun
    ({"LOCAL_SIZE": "2"}, 2),  # deepspeed
    ({"OMPI_COMM_WORLD_LOCAL_SIZE": "3"}, 3),
    ({"MPI_LOCALNRANKS": "5"}, 5),
    (STEP, 3),
    (STEP | {"SLURM_NODEID": "2"}, 1),
    (STEP | {"LOCAL_WORLD_SIZE": "2"}, 2),  # torchrun in a task of srun
    ({"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}, 2),
    ({"WORLD_SIZE": "64", "MASTER_ADDR": "node0"}, 1),
])
def test_processes_of_this_node(monkeypatch, environment, processes):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert local_processes() == processes


@pytest.mark.parametrize("environment, count", [
    ({}, 12),
    ({"LOCAL_WORLD_SIZE": "5"}, 2),
    ({"LOCAL_WORLD_SIZE": "24"}, 1),
    (STEP, 4),
    (STEP | {"SLURM_CPUS_PER_TASK": "6"}, 6),  # promised to each task: not shared again
    (STEP | {"SLURM_CPUS_PER_TASK": "64"}, 12),
    ({"SLURM_CPUS_PER_TASK": "1"}, 12),  # a batch script is no task
    (STEP | {"SLURM_CPUS_PER_TASK": "8", "LOCAL_WORLD_SIZE": "4"}, 3),
])
def test_share_of_twelve_cores(monkeypatch, environment, count):
    monkeypatch.setattr(threads, "usable_cores", lambda: 12)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert threads_per_process() == count


def test_tasks_of_a_node_are_read_as_slurm_writes_them():
    assert [_slurm_tasks_on_node("4(x2),3", str(node)) for node in range(4)] == [4, 4, 3, 1]
    assert _slurm_tasks_on_node("", "") == 1


def test_affinity_and_allocation_bound_the_cores(monkeypatch):
    everything = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(everything)})
        assert usable_cores() == 1
    finally:
        os.sched_setaffinity(0, everything)
    before = usable_cores()
    assert 1 <= before <= len(everything)
    monkeypatch.setenv("SLURM_CPUS_ON_NODE", "1")
    assert usable_cores() == 1


def test_cgroup_quotas_of_both_versions(tmp_path):
    assert _quota_of(tmp_path) is None
    (tmp_path / "cpu.cfs_quota_us").write_text("-1\n")
    (tmp_path / "cpu.cfs_period_us").write_text("100000\n")
    assert _quota_of(tmp_path) is None
    (tmp_path / "cpu.cfs_quota_us").write_text("250000\n")
    assert _quota_of(tmp_path) == 2.5
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert _quota_of(tmp_path) is None
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    assert _quota_of(tmp_path) == 1.5


def test_the_tightest_cgroup_counts(tmp_path, monkeypatch):
    """The quota of an outer group holds for the inner ones; the files are laid out as the kernel does, under another root."""
    own = {"2": "0::/job/step\n", "1": "3:cpuset:/\n2:cpu,cpuacct:/job/step\n1:name=systemd:/\n"}
    for version, root in (("2", tmp_path / "two"), ("1", tmp_path / "one" / "cpu,cpuacct")):
        (root / "job" / "step").mkdir(parents=True)
        (root / "job" / "cpu.max").write_text("150000 100000\n")
        (root / "job" / "step" / "cpu.max").write_text("400000 100000\n")
        (tmp_path / "cgroup").write_text(own[version])
        monkeypatch.setattr(threads, "_CGROUPS", tmp_path / {"2": "two", "1": "one"}[version])
        assert threads._cgroup_quota(tmp_path / "cgroup") == 2
    (tmp_path / "cgroup").write_text("0::/elsewhere\n")
    assert threads._cgroup_quota(tmp_path / "cgroup") is None
    assert threads._cgroup_quota(tmp_path / "missing") is None


def openmp(*arguments: str, **environment: str) -> dict[str, str]:
    """What libgomp says of itself when torch loads it after the command line was read, and torch's threads."""
    code = """
import sys, typer
from megadsl.cli import main
main.app.command("threads")(lambda: print("THREADS = '%d'" % __import__("torch").get_num_threads()))
main.app(sys.argv[1:], standalone_mode=False)
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, *arguments, "threads"], capture_output=True, text=True, timeout=120,
        env={**os.environ, "OMP_DISPLAY_ENV": "verbose", **environment},
    )
    assert done.returncode == 0, done.stderr
    return dict(re.findall(r"(\w+) = '(.*)'", done.stderr + done.stdout))


def test_by_default_every_core_and_no_spinning():
    said = openmp()
    assert said["THREADS"] == said["OMP_NUM_THREADS"] == str(usable_cores())
    assert said["OMP_WAIT_POLICY"] == "PASSIVE" and said["GOMP_SPINCOUNT"] == "0"


def test_what_the_user_says_comes_first():
    said = openmp(OMP_NUM_THREADS="3", GOMP_SPINCOUNT="1234")
    assert said["OMP_NUM_THREADS"] == "3" and said["GOMP_SPINCOUNT"] == "1234"
    assert openmp(OMP_NUM_THREADS="3", OMP_WAIT_POLICY="active")["OMP_WAIT_POLICY"] == "ACTIVE"
    said = openmp("--threads", "1", OMP_NUM_THREADS="2", MKL_NUM_THREADS="2")
    assert said["THREADS"] == said["OMP_NUM_THREADS"] == "1"
    # torch would take the smaller of the two.
    assert openmp("--threads", str(usable_cores()), OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")["THREADS"] == str(usable_cores())
