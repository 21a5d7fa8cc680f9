"""What the checks of tools/gpu_check.py stand on: rows, sizes, the machine with its folder of runs, and the processes that run commands."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SESSION_SECONDS = 400
LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Row:
    """One line of the table. `passed` None: a figure without a threshold, or a check that this machine cannot run."""

    check: str
    what: str
    measured: str
    wanted: str = ""
    passed: bool | None = None
    seconds: float = 0.0  # of the whole check


@dataclass(frozen=True)
class Size:
    """How much is run: the full form on a GPU, the small one on a CPU."""

    layers: int
    hidden: int
    heads: int
    seq_length: int
    steps: int
    global_batch: int
    seeds: int
    deep: dict[str, list[str]]           # overrides of the two configs whose moments are measured
    speed: tuple[dict, ...]              # arguments of speed.measure
    attention: dict                      # arguments of attention.compare
    throughput: dict[str, int] | None    # model section of the run whose tokens/s are reported
    exported: tuple[str, ...]            # families
    workers: int                         # checks that run beside each other (none beside those that time)


FULL = Size(
    layers=12, hidden=128, heads=4, seq_length=128, steps=20, global_batch=16, seeds=4, deep={"decoder-192": [], "decoder-1000": []},
    speed=(
        {"layers": 24, "hidden": 1024, "heads": 16, "seq_length": 1024, "batch": 8, "vocab_size": 32768, "pairs": 10, "gemm": 8192,
         "precision": "bf16"},
        {"layers": 192, "hidden": 256, "heads": 4, "seq_length": 512, "batch": 8, "vocab_size": 8192, "pairs": 10, "gemm": 8192,
         "precision": "bf16"},
    ),
    attention={"seq_length": 4096, "batch": 4, "heads": 16, "head_dim": 64, "layers": 8, "precision": "bf16"},
    throughput={"num_layers": 24, "hidden_size": 1024, "num_attention_heads": 16, "seq_length": 1024},
    exported=("decoder", "encoder", "encoder_decoder"), workers=3,
)
SMALL = Size(
    layers=2, hidden=32, heads=2, seq_length=32, steps=4, global_batch=4, seeds=2,
    deep={"decoder-192": ["model.num_layers=6", "model.seq_length=32"], "decoder-1000": ["model.num_layers=8", "model.seq_length=32"]},
    speed=({"layers": 2, "hidden": 32, "heads": 2, "seq_length": 32, "batch": 2, "vocab_size": 128, "pairs": 3, "gemm": 256,
            "precision": "fp32"},),
    attention={"seq_length": 160, "batch": 2, "heads": 2, "head_dim": 16, "layers": 2, "precision": "fp32"},
    throughput=None, exported=("decoder",), workers=2,
)


class Failed(Exception):
    """A command of a check did not do what it was to do; the text says which and why."""


@dataclass(frozen=True)
class Machine:
    """Where and with what the checks run."""

    device: str      # cuda or cpu
    count: int
    name: str
    folder: Path
    size: Size

    def session(self, name: str, jobs: Sequence[Sequence[str]], variables: dict[str, str] | None = None) -> "Session":
        """Start the commands `jobs` one after the other in one process."""
        # Many small processes beside each other: threads of theirs would only wait for each other.
        threads = {"OMP_NUM_THREADS": "1"} if self.device == "cpu" else {}
        return Session(self.folder, name, jobs, threads | (variables or {}))

    def torchrun(self, name: str, words: Sequence[str], processes: int = 2) -> None:
        """Run one command in several processes of torchrun."""
        done = subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), "-m", "megadsl", *words],
            env=environment(), capture_output=True, text=True, timeout=SESSION_SECONDS,
        )
        if done.returncode:
            raise Failed(f"{name} ended with {done.returncode}: {' '.join(done.stderr.strip().splitlines()[-3:])}")

    def config(self, name: str, **sections: dict) -> list[str]:
        """The words of a `train` command for a run `name` of our size: a config file of its own and its run folder."""
        size, run = self.size, self.folder / "runs" / name
        values = {
            "model": {"num_layers": size.layers, "hidden_size": size.hidden, "num_attention_heads": size.heads,
                      "seq_length": size.seq_length},
            "tokenizer": {"model": str(self.folder / "tokenizer.model")},
            "data": {"datasets": [str(self.folder / "dataset")], "num_workers": 0},
            "parallel": {"zero_stage": 1},
            "optimizer": {"lr": 1e-3, "lr_decay_style": "constant"},
            "training": {"run_dir": str(run), "train_iters": size.steps, "micro_batch_size": size.global_batch // 2,
                         "global_batch_size": size.global_batch, "eval_interval": 0, "eval_iters": 0, "device": self.device},
            "monitor": {"log_interval": 5, "tensorboard": False},
        }
        for section, changes in sections.items():
            values.setdefault(section, {}).update(changes)
        path = self.folder / "configs" / f"{name}.yaml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(values), encoding="utf-8")  # JSON is YAML
        return ["train", str(path)]

    def curve(self, name: str, key: str = "train/loss") -> list[float]:
        """A number by iteration out of a run's metrics."""
        path = self.folder / "runs" / name / "metrics.jsonl"
        if not path.is_file():
            raise Failed(f"the run {name} wrote no metrics")
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        values = [row[key] for row in rows if key in row]
        if not values or None in values:
            raise Failed(f"the run {name} has no finite {key} in every iteration")
        return values


class Session:
    """A process of session.py."""

    def __init__(self, folder: Path, name: str, jobs: Sequence[Sequence[str]], variables: dict[str, str]):
        self.jobs, self._files = jobs, folder / "sessions" / name
        self._files.mkdir(parents=True, exist_ok=True)
        (self._files / "jobs.json").write_text(json.dumps(jobs), encoding="utf-8")
        with open(self._files / "stderr", "w", encoding="utf-8") as stderr:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "gpu_checks.session", str(self._files / "jobs.json"), str(self._files / "results.json")],
                stdout=stderr, stderr=stderr, env=environment() | variables, start_new_session=True,
            )

    def results(self) -> list[str]:
        """What each command printed.

        Raises:
            Failed: at the first command that did not end well.
        """
        try:
            code = self._process.wait(SESSION_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            code = f"nothing after {SESSION_SECONDS} s"
        path = self._files / "results.json"
        results = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
        for words, result in zip(self.jobs, results, strict=False):
            if result["error"] is not None:
                raise Failed(f"{' '.join(words)}: {result['error']}")
        if len(results) < len(self.jobs):
            last = (self._files / "stderr").read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
            raise Failed(f"{' '.join(self.jobs[len(results)])}: the process ended with {code} ({' '.join(last)})")
        return [result["output"] for result in results]


def environment() -> dict[str, str]:
    """Ours without a launcher's variables; a checkout's own package comes before an installed one."""
    kept = {name: value for name, value in os.environ.items() if name not in LAUNCHER and not name.startswith(("SLURM_", "OMPI_", "PMI_"))}
    paths = [str(ROOT / "tools"), *([str(ROOT)] if (ROOT / "megadsl").is_dir() else []), *filter(None, [kept.get("PYTHONPATH")])]
    return kept | {"PYTHONPATH": os.pathsep.join(paths)}


def prepare(machine: Machine) -> None:
    """Corpus, tokenizer and dataset out of some packages of Python's own library, by the commands."""
    library, folder = Path(os.__file__).parent, machine.folder
    texts = [str(library / package) for package in ("asyncio", "email", "json", "logging", "http", "unittest")]
    machine.session("prepare", [
        ["data", "corpus", *texts, "--output", str(folder / "corpus"), "--max-document-chars", "4000"],
        ["tokenizer", "train", "--corpus", str(folder / "corpus"), "--output", str(folder / "tokenizer.model"), "--vocab-size", "512",
         "--type", "bpe"],
        ["data", "preprocess", "--corpus", str(folder / "corpus"), "--tokenizer", str(folder / "tokenizer.model"), "--output",
         str(folder / "dataset")],
    ]).results()


def describe(device: str, folder: Path) -> dict:
    """The facts of session.py."""
    return json.loads(Session(folder, "facts", [["facts", device]], {}).results()[0])
