"""Rank discovery under real launchers and by their variables, and rank arithmetic against both libraries that number ranks."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from ranks import free_port

from megadsl.errors import UserError
from megadsl.parallel.launch import discover_launch, launched_rank
from megadsl.parallel.topology import Topology

BIN = Path(sys.executable).parent
ROOT = Path(__file__).parents[2]
NAMES = re.compile("^(RANK|WORLD_SIZE|LOCAL_RANK|MASTER_.*|TORCHELASTIC_.*|GROUP_.*|(SLURM|OMPI_COMM|PMI)_.*)$")
TORCH = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "node0", "MASTER_PORT": "123"}
STEP = {"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "77", "SLURM_STEP_NODELIST": "n0",
        "MASTER_ADDR": "127.0.0.1"}
# What a launched process has to be able to do: know itself, and meet the others where it was told to.
MEET = """
from datetime import timedelta
from torch.distributed import TCPStore
from megadsl.parallel.launch import discover_launch
launch = discover_launch()
store = TCPStore(launch.master_addr, launch.master_port, launch.world_size, launch.rank == 0, timedelta(seconds=30))
store.set(str(launch.rank), str(launch.local_rank))
everyone = [int(store.get(str(rank))) for rank in range(launch.world_size)]
print(f"[{launch.launcher}: rank {launch.rank} of {launch.world_size}, local ranks {everyone}]\\n", end="", flush=True)
if store.add("left", 1) < launch.world_size and launch.rank == 0:
    while store.add("left", 0) < launch.world_size: pass
"""


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in [name for name in os.environ if NAMES.match(name)]:
        monkeypatch.delenv(name)


def set_all(monkeypatch, values: dict[str, str]) -> None:
    for name, value in values.items():
        monkeypatch.setenv(name, value)


def test_one_process_alone():
    launch = discover_launch()
    assert (launch.rank, launch.world_size, launch.local_rank) == (0, 1, 0)


def test_torchrun_variables(monkeypatch):
    set_all(monkeypatch, TORCH)
    launch = discover_launch()
    assert (launch.rank, launch.world_size, launch.local_rank) == (5, 8, 1) and launched_rank() == 5
    assert (launch.master_addr, launch.master_port) == ("node0", 123)


@pytest.mark.parametrize("changes", [{"RANK": "first"}, {"RANK": "8"}, {"RANK": "-1"}, {"RANK": None}, {"LOCAL_RANK": "x"}])
def test_impossible_variables_are_a_sentence(monkeypatch, changes):
    set_all(monkeypatch, {name: value for name, value in (TORCH | changes).items() if value is not None})
    with pytest.raises(UserError, match=next(iter(changes))):
        discover_launch()


def test_slurm_variables_count_only_inside_a_step(monkeypatch):
    set_all(monkeypatch, {"SLURM_PROCID": "0", "SLURM_NTASKS": "2", "SLURM_JOB_ID": "77"})  # sbatch sets them in the batch script too
    assert discover_launch().launcher == "one process"
    set_all(monkeypatch, STEP)
    launch = discover_launch()
    assert (launch.rank, launch.world_size, launch.local_rank, launch.launcher) == (3, 4, 1, "srun")
    monkeypatch.setenv("SLURM_STEP_ID", "1")
    assert discover_launch().master_port != launch.master_port, "two steps of a job may share a node"
    monkeypatch.delenv("SLURM_LOCALID")
    with pytest.raises(UserError, match="SLURM_LOCALID"):
        discover_launch()


ELASTIC = {"TORCHELASTIC_RUN_ID": "x", "TORCHELASTIC_RESTART_COUNT": "0", "RANK": "0", "WORLD_SIZE": "8"}


@pytest.mark.parametrize("torch, agree", [
    ({"RANK": "0", "WORLD_SIZE": "1"}, False),                     # left from another run: four runs of one process
    ({"RANK": "0", "WORLD_SIZE": "4"}, False),                     # the step says rank 3
    ({"RANK": "3", "WORLD_SIZE": "4"}, True),                      # exported by the user's own script
    ({"RANK": "6", "WORLD_SIZE": "8"}, True),                      # a launcher of two processes in each task
    (ELASTIC | {"GROUP_WORLD_SIZE": "4"}, True),                   # torchrun, one agent a task
    (ELASTIC | {"GROUP_WORLD_SIZE": "1"}, False),                  # four torchruns that do not know of each other
    (ELASTIC | {"GROUP_WORLD_SIZE": "3", "TORCHELASTIC_RESTART_COUNT": "1"}, True),  # an elastic run that lost a node
])
def test_launchers_inside_a_step_agree_or_say_who_does_not(monkeypatch, torch, agree):
    set_all(monkeypatch, STEP | torch)
    if agree:
        assert discover_launch().world_size == int(torch["WORLD_SIZE"])
    else:
        with pytest.raises(UserError, match="(RANK=|GROUP_WORLD_SIZE).* SLURM_PROCID=3 and SLURM_STEP_NUM_TASKS=4"):
            discover_launch()


def launcher_commands(kind: str, folder: Path) -> list[list]:
    """The command lines, one a node, that start two processes of folder/meet.py."""
    script, port = str(folder / "meet.py"), str(free_port())
    if kind == "deepspeed":
        return [[BIN / "deepspeed", "--num_accelerators", "2", "--master_port", port, script]]
    if kind == "deepspeed hostfile":
        (folder / "hostfile").write_text("localhost slots=1\n127.0.0.1 slots=1\n")
        shared = [BIN / "deepspeed", "--hostfile", str(folder / "hostfile"), "--no_ssh", "--master_addr", "127.0.0.1", "--master_port", port]
        return [[*shared, "--node_rank", rank, script] for rank in "01"]
    if kind == "torchrun":
        return [[BIN / "torchrun", "--nproc_per_node", "2", "--master_port", port, script]]
    mpirun = shutil.which("mpirun", path=str(BIN)) or pytest.skip("needs package mpich")
    return [[mpirun, "-n", "2", sys.executable, script]]


@pytest.mark.parametrize("kind", ["torchrun", "deepspeed", "deepspeed hostfile", "mpirun"])
def test_two_processes_of_a_real_launcher_meet(kind, tmp_path):
    (tmp_path / "meet.py").write_text(MEET)
    environment = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
               for command in launcher_commands(kind, tmp_path)]
    output = "".join(process.communicate(timeout=120)[0] for process in started)
    met = re.findall(r"\[(\w+)[ \w]*: rank (\d) of (\d), local ranks (.*?)\]\]?", output)
    local_ranks = "[0, 0" if kind == "deepspeed hostfile" else "[0, 1"
    assert sorted(met) == [(kind.split()[0], rank, "2", local_ranks) for rank in "01"], output


def test_mpirun_of_an_mpi_that_python_does_not_use(tmp_path):
    """Two singletons would be two runs in one folder: the launcher's own count is compared with MPI's."""
    pytest.importorskip("mpi4py", reason="needs package mpi4py")
    if not (BIN / "mpirun").exists():
        pytest.skip("needs package mpich")
    code = "from megadsl.parallel.launch import discover_launch as d; d()"
    environment = {**os.environ, "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"}  # as another mpirun would set them
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert "OMPI_COMM_WORLD_SIZE=2, but MPI (MPICH" in done.stderr and "rank 0 of 1" in done.stderr, done.stderr


@pytest.mark.parametrize("sizes", [(2, 2, 2), (1, 4, 2), (4, 1, 3)])
def test_rank_order_is_deepspeeds(sizes):
    from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology

    tensor, pipeline, data = sizes
    theirs = PipeModelDataParallelTopology(pipeline, tensor, data)
    ours = Topology(tensor, pipeline, data)
    for rank in range(ours.world_size):
        coordinate, other = ours.coordinate(rank), theirs.get_coord(rank)
        assert (coordinate.pipeline, coordinate.data, coordinate.tensor) == (other.pipe, other.data, other.model)


@pytest.mark.parametrize("sizes", [(2, 2, 2), (1, 4, 2), (4, 1, 3)])
def test_rank_order_is_megatrons(sizes):
    from megatron.core.parallel_state import RankGenerator

    tensor, pipeline, data = sizes
    generator = RankGenerator(tp=tensor, ep=1, dp=data, pp=pipeline, cp=1, order="tp-cp-ep-dp-pp")
    ours = Topology(tensor, pipeline, data)
    groups = {"tp": ("data", "pipeline"), "dp": ("tensor", "pipeline"), "pp": ("tensor", "data")}
    for token, fixed in groups.items():
        for group in generator.get_ranks(token):
            coordinates = [ours.coordinate(rank) for rank in group]
            for axis in fixed:
                assert len({getattr(coordinate, axis) for coordinate in coordinates}) == 1
