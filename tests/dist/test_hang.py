"""A run that cannot go on, on real processes: stopped in a validation, on a disk that does not answer, and with a rank killed.

`hang_minutes` is 3 s here: a validation of many times that goes on as long as it makes progress.
"""

import os
import signal
import time
from pathlib import Path

import pytest
from ranks import ForkServer

from megadsl.config import Config
from megadsl.training.hang import Phase, Watch

SECONDS = 3.0


@pytest.fixture(scope="module")
def server():
    with ForkServer() as started:
        yield started


def configured(small_data, run_dir: Path, **sections) -> Config:
    training = {"train_iters": 2, "eval_iters": 1, "hang_minutes": SECONDS / 60, **sections.pop("training", {})}
    return small_data.config(run_dir, model={"num_layers": 2, "hidden_size": 16, "num_attention_heads": 2}, training=training,
                             monitor={"log_interval": 1}, **sections)


def to_file(run_dir: Path) -> None:
    """What this process says goes to RUN/said-RANK."""
    run_dir.mkdir(parents=True, exist_ok=True)
    file = os.open(run_dir / f"said-{os.environ['RANK']}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)


def run(config: Config, slow_rank: str = "") -> None:
    """Train; on `slow_rank` the disk never says that a file is written, as an NFS server that has gone."""
    from megadsl.checkpoint import weights
    from megadsl.training.loop import train

    to_file(Path(config.training.run_dir))
    if os.environ["RANK"] == slow_rank:
        write = weights._write_file
        weights._write_file = lambda path, tensors: (write(path, tensors), time.sleep(1000))
    train(config)


def wait_for(path: Path, words: str, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not (path.exists() and words in path.read_text()):
        assert time.monotonic() < end, path.read_text() if path.exists() else f"{path} is not there"
        time.sleep(0.05)


def said(run_dir: Path, rank: int) -> str:
    text = (run_dir / f"said-{rank}").read_text()
    assert "Traceback (most recent call last)" not in text, text
    return text


def test_a_validation_may_take_long_but_not_stand_still(server, small_data, tmp_path):
    config = configured(small_data, tmp_path, training={"eval_iters": 10**6}, parallel={"tensor_model_parallel_size": 2})
    processes = server.start(2, run, config)
    wait_for(tmp_path / "said-0", "iteration 2/2")
    time.sleep(1.5 * SECONDS)
    assert "no progress" not in said(tmp_path, 0) and "no progress" not in said(tmp_path, 1)
    os.kill(processes[1], signal.SIGSTOP)
    wait_for(tmp_path / "said-0", "rank 0: no progress in validation for 0.1 minutes (training.hang_minutes)")
    os.kill(processes[1], signal.SIGCONT)
    assert server.results() == [None, None], "both have ended the process"
    assert "in validation" in said(tmp_path, 1)
    for rank in (0, 1):
        assert "in evaluate" in (tmp_path / "stacks" / f"rank-{rank}.txt").read_text()


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_save_on_a_disk_that_does_not_answer(server, small_data, tmp_path, asynchronous):
    server.start(2, run, configured(small_data, tmp_path, checkpoint={"async_save": asynchronous}), "1")
    assert server.results() == [None, None], "both have ended the process"
    assert any("no progress in saving for 0.1 minutes (training.hang_minutes)" in said(tmp_path, rank) for rank in (0, 1))
    assert all("in saving" in said(tmp_path, rank) for rank in (0, 1))
    assert "in write_tensors" in (tmp_path / "stacks" / "rank-1.txt").read_text()
    assert "in _write" in (tmp_path / "stacks" / "rank-0.txt").read_text(), "rank 0 waits for it"


def test_a_killed_rank_is_a_sentence_and_a_traceback_in_a_file(server, small_data, tmp_path):
    processes = server.start(2, run, configured(small_data, tmp_path, training={"train_iters": 100_000}))
    wait_for(tmp_path / "said-0", "iteration      3/100000")
    os.kill(processes[1], signal.SIGKILL)
    assert server.results() == [None, None]
    file = tmp_path / "stacks" / "lost-rank-0.txt"
    assert "rank 0 has lost another rank" in said(tmp_path, 0) and f"The traceback is in {file}." in said(tmp_path, 0)
    assert "Traceback (most recent call last)" in file.read_text() and "loop.py" in file.read_text()


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_rank_killed_while_it_saves_is_a_sentence(server, small_data, tmp_path, asynchronous):
    config = configured(small_data, tmp_path, training={"hang_minutes": 5}, checkpoint={"async_save": asynchronous})
    processes = server.start(2, run, config, "1")
    end = time.monotonic() + 60
    while not list((tmp_path / "checkpoints").glob("*/*/rank-00001*")):
        assert time.monotonic() < end, said(tmp_path, 1)
        time.sleep(0.05)
    os.kill(processes[1], signal.SIGKILL)
    assert server.results() == [None, None]
    assert "rank 0 has lost another rank" in said(tmp_path, 0)
    assert "in _write" in (tmp_path / "stacks" / "lost-rank-0.txt").read_text()


def ranks_that_wait(folder: Path) -> None:
    """Rank 0 goes on for 3 hangs, then for none; rank 1 waits for it all the time."""
    to_file(folder)
    watch = Watch(1.5 / 60, folder, int(os.environ["RANK"]))
    with watch.during(Phase.SAVING):
        end = time.monotonic() + 4.5
        while time.monotonic() < end:
            if os.environ["RANK"] == "0":
                watch.beat(Phase.SAVING)
                watch.beat(Phase.VALIDATION)  # not what goes on
            time.sleep(0.02)
        print("until here", flush=True)
        time.sleep(60)


def test_ranks_that_are_done_wait_for_one_that_goes_on(server, tmp_path):
    server.start(2, ranks_that_wait, tmp_path)
    assert server.results() == [None, None], "both have ended the process"
    for rank in (0, 1):
        assert said(tmp_path, rank).startswith("until here\nmegadsl: rank ")
    assert any("no progress in saving for" in said(tmp_path, rank) for rank in (0, 1))
