"""A real two-node SLURM for the session, and a user's project. Tests talk to it through sbatch, srun, scontrol and squeue alone."""

import os
import re
import shutil
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from jobs import ITERATIONS

ROOT = Path(__file__).resolve().parents[2]
PATH = os.environ["PATH"] + os.pathsep + "/usr/sbin"


def _three_free_ports() -> int:
    for first in range(17100, 19000, 3):
        try:
            for port in range(first, first + 3):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", port))
            return first
        except OSError:
            continue
    raise RuntimeError("no three ports in a row are free")


@dataclass(frozen=True)
class Job:
    """What SLURM and the job's own log say about a job that has ended."""

    state: str
    nodes: str
    log: str


class Cluster:
    """sbatch and scontrol against the local cluster."""

    def __init__(self, environment: dict[str, str]):
        self.environment = environment

    def run(self, *command: str, cwd: Path = ROOT) -> str:
        done = subprocess.run(command, cwd=cwd, env=self.environment, capture_output=True, text=True, timeout=90)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def submit(self, *arguments: str, cwd: Path) -> str:
        """sbatch; returns the job id."""
        return self.run("sbatch", "--parsable", "--output=%j.log", *arguments, cwd=cwd).strip()

    def wait(self, job: str, cwd: Path, seconds: float = 80, log: str | None = None) -> Job:
        """Wait for the end of a job."""
        path = cwd / (log or f"{job}.log")
        deadline = time.monotonic() + seconds
        while True:
            record = self.run("scontrol", "show", "job", job)
            state = re.search(r"JobState=(\S+)", record).group(1)
            if state not in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING"):
                break
            if "Reason=BeginTime" in record:
                self.start_now(job)
            assert time.monotonic() < deadline, f"job {job} is still {state}:\n{path.read_text() if path.exists() else ''}"
            time.sleep(0.3)
        return Job(state, re.search(r"\bNodeList=(\S*)", record).group(1), path.read_text() if path.exists() else '')


    def start_now(self, job: str, seconds: float = 30) -> None:
        """A requeued job would wait for its credentials to expire (20 s here); let it start at once."""
        deadline = time.monotonic() + seconds
        while "Reason=BeginTime" not in self.run("scontrol", "show", "job", job):
            assert time.monotonic() < deadline, f"job {job} is not requeued"
            time.sleep(0.2)
        # In the second in which a node revokes the first run's credential it also takes the second run's for revoked and kills the job.
        time.sleep(2.5)
        subprocess.run(["scontrol", "update", f"JobId={job}", "StartTime=now"], env=self.environment, capture_output=True, timeout=60)

    def wait_for_line(self, job: str, pattern: str, cwd: Path, seconds: float = 80) -> None:
        """Wait until the log of a job has a line that matches."""
        deadline = time.monotonic() + seconds
        while not ((cwd / f"{job}.log").exists() and re.search(pattern, (cwd / f"{job}.log").read_text())):
            assert time.monotonic() < deadline, f"no line {pattern!r} from job {job}:\n{(cwd / f'{job}.log').read_text()}"
            time.sleep(0.1)


@pytest.fixture(scope="session")
def cluster():
    if not all(shutil.which(program, path=PATH) for program in ("sbatch", "munged")):
        pytest.skip("needs package slurm-wlm")
    # Not pytest's tmp_path: munge's socket needs a short name and a folder that others may enter.
    folder = Path(tempfile.mkdtemp(prefix="megadsl-cluster-"))
    folder.chmod(0o755)
    ours = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    environment = {name: value for name, value in os.environ.items() if name not in ours and not name.startswith(("SLURM_", "SBATCH_"))}
    environment |= {"LOCAL_CLUSTER_DIR": str(folder), "LOCAL_CLUSTER_PORT": str(_three_free_ports()), "OMP_NUM_THREADS": "1",
                    "SLURM_CONF": str(folder / "slurm.conf")}
    script = str(ROOT / "slurm/local_cluster.sh")
    # Not captured through pipes: the daemons keep what they inherit open.
    with open(folder / "up.log", "w") as log:
        code = subprocess.call([script, "up"], env=environment, stdout=log, stderr=log, timeout=60)
    try:
        assert code == 0, (folder / "up.log").read_text()
        yield Cluster(environment)
    finally:
        subprocess.run([script, "down"], env=environment, check=True, timeout=60)
        left = subprocess.run(["pgrep", "-f", f"{folder}/"], capture_output=True, text=True).stdout
        assert not left, f"local_cluster.sh down left processes: {left}"
        shutil.rmtree(folder)


@pytest.fixture(scope="session")
def project(tmp_path_factory) -> Path:
    """A user's folder, not the repository: data made by the product's own commands, and a config with relative paths."""
    folder = tmp_path_factory.mktemp("project")
    asyncio = str(Path(sysconfig.get_paths()["stdlib"]) / "asyncio")
    for command in (
        f"data corpus {asyncio} --output corpus --max-document-chars 4000 --validation-fraction 0.1 --test-fraction 0.1",
        "tokenizer train --corpus corpus --output tokenizer.model --vocab-size 400",
        "data preprocess --corpus corpus --tokenizer tokenizer.model --output dataset --workers 1 --seq-length 32",
    ):
        done = subprocess.run([sys.executable, "-m", "megadsl", *command.split()], cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    config = {
        "model": {"num_layers": 4, "hidden_size": 32, "num_attention_heads": 4, "seq_length": 32},
        "parallel": {"zero_stage": 1},
        "tokenizer": {"model": "tokenizer.model"},
        "data": {"datasets": ["dataset"], "num_workers": 0},
        "optimizer": {"lr": 1e-2, "lr_warmup_iters": 2},
        "training": {"run_dir": "run", "train_iters": ITERATIONS, "micro_batch_size": 4, "global_batch_size": 8, "eval_interval": 0,
                     "eval_iters": 0},
        "monitor": {"log_interval": 4, "tensorboard": False},
    }
    (folder / "tiny.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    return folder
