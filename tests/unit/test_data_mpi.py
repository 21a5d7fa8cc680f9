"""Dataset preparation under a real mpirun: the bytes of the single-process run, finished shards kept, one sentence for an error."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from small_data import make_dataset

from megadsl.data.corpus import SPLITS
from megadsl.data.preprocess import preprocess

MPIRUN = Path(sys.executable).parent / "mpirun"
ROOT = Path(__file__).parents[2]
OUTPUTS = [f"{split}.{kind}" for split in SPLITS for kind in ("bin", "idx")] + ["tokenizer.model", "stats.json", "dataset.json"]
# The command itself, with shards so small that a small corpus has dozens of them; {fault} goes wrong where a test wants it.
COMMAND = """
import os, sys
import megadsl.data.preprocess as module
from megadsl.cli.main import run
module._SHARD_BYTES = 12_000
{fault}
run()
"""

pytestmark = pytest.mark.skipif(not MPIRUN.exists(), reason="needs package mpich")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("mpi"))


def prepare(folder: Path, output: Path, ranks: int, fault: str = "") -> subprocess.CompletedProcess:
    arguments = ["data", "preprocess", "--corpus", folder / "corpus", "--tokenizer", folder / "small.model", "--output", output]
    return subprocess.run(
        [MPIRUN, "-n", str(ranks), sys.executable, "-c", COMMAND.format(fault=fault), *map(str, arguments)], cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=120,
    )


def shards(output: Path) -> dict[str, int]:
    """Finished shards and when they were written."""
    return {path.name: path.stat().st_mtime_ns for path in output.glob(".shards-*/[!.]*.npz")}


def assert_same_dataset(output: Path, folder: Path) -> None:
    for name in OUTPUTS:
        assert (output / name).read_bytes() == (folder / "dataset" / name).read_bytes(), name
    assert not [path for path in output.iterdir() if path.name.startswith(".")]


def test_bytes_do_not_depend_on_ranks(folder, tmp_path):
    """Two ranks here, three in the next test."""
    done = prepare(folder, tmp_path / "out", 2)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("dataset.json: written") == 1 and "shards on 2 ranks" in done.stderr
    assert_same_dataset(tmp_path / "out", folder)


def test_shards_outlive_a_kill(folder, tmp_path):
    """A rank is killed -9 after three shards: mpirun ends; the same command on more ranks goes on from what is there."""
    killed = prepare(folder, tmp_path / "out", 2, """
real, count = module.encode_batch, []
def encode_batch(*arguments):
    count.append(1)
    if len(count) > 3 and module.mpi_world().rank == 1:
        os.kill(os.getpid(), 9)
    return real(*arguments)
module.encode_batch = encode_batch
""")
    assert killed.returncode != 0 and not (tmp_path / "out/dataset.json").exists()
    kept = shards(tmp_path / "out")
    assert len(kept) >= 3
    resumed = prepare(folder, tmp_path / "out", 3, f"""
write = module.np.savez
def savez(file, **arrays):
    assert not any(name in file.name for name in {sorted(kept)}), "a finished shard is written again"
    write(file, **arrays)
module.np.savez = savez
""")
    assert resumed.returncode == 0, resumed.stderr
    assert f"({len(kept)} are there)" in resumed.stderr
    assert_same_dataset(tmp_path / "out", folder)


def test_an_error_on_one_rank_ends_all_with_one_sentence(folder, tmp_path):
    """A folder lies where rank 1 wants to put its first shard: a real error of its file system, on that rank alone."""
    output = tmp_path / "out"
    preparation = """
job = module._Job.finished_shards
def finished_shards(self):
    (self.shards / "train-0001.npz" / "x").mkdir(parents=True, exist_ok=True)
    return job(self) - {"train-0001.npz"}
module._Job.finished_shards = finished_shards
"""
    failed = prepare(folder, output, 2, preparation)
    assert failed.returncode == 2, failed.stderr
    said = [line for line in failed.stderr.splitlines() if line.startswith("megadsl:")]
    assert len(said) == 1 and "rank 1 on" in said[0] and "train-0001.npz" in said[0] and "kept" in said[0], failed.stderr
    assert "Traceback" not in failed.stderr and not (output / "dataset.json").exists()


def test_a_damaged_shard_is_a_sentence_and_removed(folder, tmp_path):
    output = tmp_path / "out"
    spoil = """
join = module._read_shards
def spoiled(job, split):
    (job.shards / "train-0002.npz").write_bytes(b"cut")
    return join(job, split)
module._read_shards = spoiled
"""
    failed = prepare(folder, output, 2, spoil)
    assert failed.returncode == 2 and "train-0002.npz" in failed.stderr and "Traceback" not in failed.stderr, failed.stderr
    assert "train-0002.npz" not in shards(output)


def test_workers_are_for_one_process(folder, tmp_path):
    arguments = ["data", "preprocess", "--corpus", folder, "--tokenizer", folder / "small.model", "--output", tmp_path, "--workers", "2"]
    done = subprocess.run([MPIRUN, "-n", "2", sys.executable, "-m", "megadsl", *map(str, arguments)], cwd=ROOT, capture_output=True,
                          text=True, timeout=60)
    assert done.returncode == 2 and done.stderr.count("--workers 2 is for one process") == 1, done.stderr


def test_one_process_needs_no_mpi(folder, tmp_path):
    preprocess(folder / "corpus", folder / "small.model", tmp_path / "out", workers=2)
    assert_same_dataset(tmp_path / "out", folder)
