"""Rank discovery: one answer to "which process am I?" for every launcher.

Three views may exist at once: torchrun's and deepspeed's variables (RANK, ...), MPI's (mpirun), a SLURM step's (srun). The
innermost one counts, and the ones around it must be able to have started it. Nothing here touches torch, so that a config
can be checked against the world size before torch is loaded.
"""

import ipaddress
import os
import socket
import subprocess
from dataclasses import dataclass

from megadsl.errors import UserError

# The variables in which mpirun tells a process its rank and size: Open MPI's, MPICH's and Intel MPI's.
_MPI_NAMES = (("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"), ("PMI_RANK", "PMI_SIZE"))
_OPEN_MPI_LOCAL_RANK = "OMPI_COMM_WORLD_LOCAL_RANK"


@dataclass(frozen=True)
class Launch:
    """This process among all processes of the run."""

    rank: int
    world_size: int
    local_rank: int
    master_addr: str
    master_port: int
    launcher: str

    @classmethod
    def alone(cls) -> "Launch":
        """One process, whatever launcher started it. It needs no port (groups.py)."""
        return cls(0, 1, 0, "127.0.0.1", 0, "one process")

    def export(self, device_index: int | None = None) -> None:
        """Set the variables that torch.distributed and DeepSpeed read.

        DeepSpeed takes LOCAL_RANK for the number of the GPU (engine, PipelineModule, ZeRO 3): where there is one, that is
        `device_index`, which differs from the local rank if the launcher shows each process its own GPU alone.
        """
        local_rank = str(self.local_rank if device_index is None else device_index)
        os.environ.update(
            RANK=str(self.rank), WORLD_SIZE=str(self.world_size), LOCAL_RANK=local_rank, MASTER_ADDR=self.master_addr,
            MASTER_PORT=str(self.master_port),
        )
        if _OPEN_MPI_LOCAL_RANK in os.environ:
            os.environ[_OPEN_MPI_LOCAL_RANK] = local_rank  # DeepSpeed asserts that the two are equal


@dataclass(frozen=True)
class View:
    """What one launcher's variables say, and how they are to be quoted."""

    rank: int
    size: int
    words: str

    @classmethod
    def read(cls, rank_name: str, size_name: str) -> "View | None":
        """None where the variables are not set; UserError where only one is, or where they cannot be."""
        rank, size = os.environ.get(rank_name), os.environ.get(size_name)
        if rank is None and size is None:
            return None
        words = f"{rank_name}={rank} and {size_name}={size}"
        if rank is None or size is None:
            missing, given = (rank_name, size_name) if rank is None else (size_name, rank_name)
            raise UserError(f"{given} is set but {missing} is not; unset {given} to run one process, or start the run with a launcher.")
        if not (rank.isdecimal() and size.isdecimal() and int(rank) < int(size)):
            raise UserError(f"{words} are not a rank below a number of processes; unset both to run one process.")
        return cls(int(rank), int(size), words)


def discover_launch() -> Launch:
    """Find out how this process was started.

    Raises:
        UserError: a launcher's variables are missing or cannot be, or two launchers contradict each other.
    """
    torch, mpi, slurm = View.read("RANK", "WORLD_SIZE"), _mpi_view(), _slurm_view()
    if torch:
        for outer in (mpi, slurm):
            if outer:
                _check_nesting(torch, outer)
        return _from_environment(torch)
    if mpi and not _srun_speaks_pmi():
        # Not compared with a step: mpirun inside a job starts its own helpers by srun, and we inherit their variables.
        return _from_mpi(mpi)
    return _from_slurm(slurm) if slurm else Launch.alone()


def launched_rank() -> int:
    """This process's rank by the variables alone; 0 where they are contradictory, so that somebody speaks."""
    try:
        views = (View.read("RANK", "WORLD_SIZE"), _mpi_view(), _slurm_view())
    except UserError:
        return 0
    return next((view.rank for view in views if view), 0)


def mpi_world():
    """MPI's COMM_WORLD where mpirun or srun started several processes, else None.

    Raises:
        UserError: mpi4py cannot be used, or it sees one process where the launcher started more (a singleton).
    """
    mpi, slurm = _mpi_view(), _slurm_view()
    view = mpi if mpi else slurm
    if view is None or view.size == 1:
        return None
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{view.words} say that MPI started this process, but mpi4py cannot be used ({reason}); install an MPI, for example "
            "`pip install mpich`, and start with its mpirun."
        ) from error
    world = MPI.COMM_WORLD
    if (world.rank, world.size) != (view.rank, view.size):
        library = MPI.Get_library_version().splitlines()[0].split(",")[0].strip("\0 ")
        way_out = (
            f"start with the mpirun of {library}, or let MPI4PY_MPIABI and MPI4PY_LIBMPI name the MPI of your mpirun" if mpi else
            "start with `srun --mpi=pmi2` (MPICH, Intel MPI) or `mpirun` inside the job"
        )
        raise UserError(
            f"{view.words}, but MPI ({library}) says rank {world.rank} of {world.size}: it was not told of the others; {way_out}."
        )
    return world


def _mpi_view() -> View | None:
    views = (View.read(*names) for names in _MPI_NAMES)
    return next((view for view in views if view), None)


def _slurm_view() -> View | None:
    # SLURM_PROCID alone is set in a batch script too, which is one process.
    return View.read("SLURM_PROCID", "SLURM_STEP_NUM_TASKS") if "SLURM_STEP_NUM_TASKS" in os.environ else None


def _srun_speaks_pmi() -> bool:
    return "SLURM_STEP_NUM_TASKS" in os.environ and "PMI_JOBID" in os.environ


def _check_nesting(inner: View, outer: View) -> None:
    """torchrun inside a step (or mpirun) is fine if every task of it became at least one rank."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        if inner.size < outer.size or (inner.size == outer.size and inner.rank != outer.rank):
            raise UserError(
                f"{inner.words}, but {outer.words}: two launchers contradict each other; unset RANK and WORLD_SIZE (are they left "
                "from another run?), or start with one launcher only."
            )
        return
    agents = os.environ.get("GROUP_WORLD_SIZE", "")
    # After a restart an elastic run may go on with fewer agents.
    if agents.isdecimal() and int(agents) < outer.size and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        raise UserError(
            f"torchrun forms a run of {agents} agent(s) (GROUP_WORLD_SIZE), but {outer.words}: {outer.size} were started; give "
            f"torchrun --nnodes {outer.size} --rdzv_backend c10d --rdzv_endpoint FIRST_NODE:29500, or start one task."
        )


def _from_environment(view: View) -> Launch:
    local_rank, port = os.environ.get("LOCAL_RANK", "0"), os.environ.get("MASTER_PORT", "29500")
    if not (local_rank.isdecimal() and port.isdecimal()):
        raise UserError(f"LOCAL_RANK={local_rank} and MASTER_PORT={port} must be whole numbers; unset RANK and WORLD_SIZE to run one process.")
    launcher = "torchrun" if "TORCHELASTIC_RUN_ID" in os.environ else "deepspeed or RANK"
    return Launch(view.rank, view.size, int(local_rank), os.environ.get("MASTER_ADDR", "127.0.0.1"), int(port), launcher)


def _from_slurm(view: View) -> Launch:
    environment = os.environ
    missing = [name for name in ("SLURM_JOB_ID", "SLURM_LOCALID", "SLURM_STEP_NODELIST") if name not in environment]
    if missing:
        raise UserError(f"This looks like a SLURM step, but {', '.join(missing)} is not set; start the run with srun.")
    # Steps that share a node need ports of their own; job and step tell them apart.
    port = 20000 + (int(environment["SLURM_JOB_ID"]) + 613 * int(environment.get("SLURM_STEP_ID", 0))) % 20000
    return Launch(
        view.rank, view.size, int(environment["SLURM_LOCALID"]), _slurm_master_address(), int(environment.get("MASTER_PORT", port)), "srun"
    )


def _slurm_master_address() -> str:
    if "MASTER_ADDR" in os.environ:
        return os.environ["MASTER_ADDR"]
    nodes = _scontrol("show", "hostnames", os.environ["SLURM_STEP_NODELIST"]).split()
    try:
        socket.gethostbyname(nodes[0])
        return nodes[0]
    except OSError:
        # Node names need not be host names; SLURM knows the address all the same.
        for field in _scontrol("show", "node", nodes[0]).split():
            if field.startswith("NodeAddr="):
                return field.partition("=")[2]
    raise UserError(f"The first node of the SLURM step, {nodes[0]}, has no address; set MASTER_ADDR in the job script.")


def _scontrol(*arguments: str) -> str:
    try:
        return subprocess.run(["scontrol", *arguments], capture_output=True, text=True, check=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise UserError(f"scontrol {' '.join(arguments)} failed ({error}); set MASTER_ADDR in the job script.") from error


def _from_mpi(view: View) -> Launch:
    world = mpi_world()
    if world is None:
        return Launch.alone()
    from mpi4py import MPI

    local = world.Split_type(MPI.COMM_TYPE_SHARED)
    one_machine = local.size == world.size
    meeting_point = (os.environ.get("MASTER_ADDR") or _own_address(one_machine), _free_port()) if world.rank == 0 else None
    address, port = world.bcast(meeting_point, root=0)
    return Launch(view.rank, view.size, local.rank, address, port, "mpirun")


def _own_address(one_machine: bool) -> str:
    """The address at which other machines reach this one."""
    if one_machine:
        return "127.0.0.1"
    try:
        address = socket.gethostbyname(socket.gethostname())
    except OSError:
        address = "127.0.0.1"
    if not ipaddress.ip_address(address).is_loopback:
        return address
    # Debian gives a machine's own name a loopback address. Connecting a datagram socket sends nothing, but picks a route.
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("10.255.255.255", 1))
        except OSError as error:
            raise UserError(f"{socket.gethostname()} has no address that other machines reach; set MASTER_ADDR.") from error
        return probe.getsockname()[0]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]
