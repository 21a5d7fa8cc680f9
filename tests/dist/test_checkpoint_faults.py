"""Checkpoints under kill -9, a full disk, damaged files, a second run and malicious files. Real processes, forked to be cheap."""

import contextlib
import io
import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ranks import ForkServer

from megadsl.checkpoint.manifest import FileRecord, Manifest, damaged_files, read_manifest, record_of, write_manifest
from megadsl.checkpoint.store import CheckpointStore
from megadsl.config import Config
from megadsl.errors import UserError

MODEL = {"num_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "hidden_dropout": 0.1, "attention_dropout": 0.1}


@pytest.fixture(scope="module")
def server():
    with ForkServer() as started:
        yield started


def configured(small_data, run_dir: Path, iterations: int, zero: int = 1, **checkpoint) -> Config:
    return small_data.config(
        run_dir, model=MODEL, parallel={"zero_stage": zero}, optimizer={"lr_decay_iters": 100},
        training={"train_iters": iterations, "eval_iters": 0, "hang_minutes": 0.0}, checkpoint=checkpoint,
    )


def run(config: Config) -> str:
    """What the run said, its sentence included if it ended with one; stdout goes to RUN/log as it comes."""
    from megadsl.training.loop import train

    folder = Path(config.training.run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / f"log-{os.environ['RANK']}", "a", buffering=1) as log:
        sys.stdout = log
        try:
            train(config)
        except UserError as error:
            print(f"megadsl: {error}")
    return (folder / f"log-{os.environ['RANK']}").read_text()


def curve(run_dir: Path) -> list[tuple]:
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [(row["iteration"], row["train/loss"], row["train/grad_norm"], row["train/lr"]) for row in rows if "train/loss" in row]


def announced(run_dir: Path) -> int:
    """The last iteration that a log line called saved; 0: none."""
    log = run_dir / "log-0"
    lines = [line for line in log.read_text().splitlines() if "| saved " in line] if log.exists() else []
    return int(lines[-1].split()[1]) if lines else 0


@pytest.mark.parametrize("world, zero, kills, asynchronous", [(1, 1, 14, False), (2, 2, 4, False), (2, 3, 4, True)])
def test_kills_at_random_moments_lose_no_announced_save(server, small_data, tmp_path, world, zero, kills, asynchronous):
    """22 kills in all; a save after every iteration, so that most of them fall into one."""
    iterations, moment = 150, random.Random(world + zero)
    server.run(world, run, configured(small_data, tmp_path / "straight", iterations, zero))
    config = configured(small_data, tmp_path / "killed", iterations, zero, save_interval=1, keep_last=2, async_save=asynchronous)
    inside = 0
    store = CheckpointStore(tmp_path / "killed" / "checkpoints")
    for number in range(kills):
        before, processes = announced(tmp_path / "killed"), server.start(world, run, config)
        deadline = time.monotonic() + 60
        while announced(tmp_path / "killed") == before and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(moment.uniform(0, 0.15))
        if number % 2:  # on a busy machine a moment by chance seldom falls into a save
            while not any(store.folder.glob(".saving-*")) and time.monotonic() < deadline:
                time.sleep(0.001)
        for process in processes:
            os.kill(process, signal.SIGKILL)
        server.results()
        inside += any(store.folder.glob(".saving-*")) or any(store.folder.glob(".removed-*"))
        newest, problems = store.newest_usable({})
        assert not problems and newest.info.iteration >= announced(tmp_path / "killed")
        assert not damaged_files(newest.path, newest.manifest)
        assert newest.info.iteration < iterations, "it must be killed before its end"
    assert inside, "no kill fell into a save"
    server.run(world, run, config)
    assert curve(tmp_path / "killed") == curve(tmp_path / "straight")
    last = [read_manifest(tmp_path / name / "checkpoints" / f"iteration-{iterations:07d}") for name in ("straight", "killed")]
    tensors = [{name: record.sha256 for name, record in one.files.items() if name.endswith("tensors")} for one in last]
    assert tensors[0] == tensors[1]


def limited(config: Config, size: int) -> str:
    """Files of at most `size` bytes can be written: what a full disk is where nobody may mount one."""
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    return run(config)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_full_disk(server, small_data, tmp_path, asynchronous):
    """Room for one checkpoint and a half: a clear line, training goes on, the older one stays, nothing is left behind."""
    server.run(2, run, configured(small_data, tmp_path / "first", 5, save_interval=5))
    size = sum(file.stat().st_size for file in (tmp_path / "first" / "checkpoints").rglob("*"))
    disk, folder = tmp_path / "disk", tmp_path / "run"
    disk.mkdir()
    shutil.copytree(tmp_path / "first", folder, ignore=shutil.ignore_patterns("checkpoints"))
    (folder / "checkpoints").symlink_to(disk)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={int(size * 1.5)}", "tmpfs", disk], capture_output=True).returncode == 0
    try:
        shutil.copytree(tmp_path / "first" / "checkpoints", disk, dirs_exist_ok=True)
        config = configured(small_data, folder, 20, save_interval=5, async_save=asynchronous)
        log = server.run(2, run, config)[0] if mounted else server.run(2, limited, config, 40_000)[0]
        errors = [line for line in log.splitlines() if line.startswith("error: ")]
        assert len(errors) == 3 and "iteration 10 was not saved (rank " in errors[0], log
        assert ("No space left on device" if mounted else "File too large") in errors[0] and "iteration-0000005; training goes on" in errors[0]
        assert len(curve(folder)) == 20
        end = log.splitlines()[-1]
        assert end.startswith("megadsl: The run ends at iteration 20, whose state was not saved") and "iteration-0000005. Make room" in end
        assert [path.name for path in disk.glob("*") if path.is_dir()] == ["iteration-0000005"]
        assert [path.name for path in disk.glob(".*")] == []
        newest, problems = CheckpointStore(disk).newest_usable({})
        assert newest.info.iteration == 5 and not problems and not damaged_files(newest.path, newest.manifest)
        config = configured(small_data, folder, 20, save_interval=5, async_save=asynchronous, on_save_error="stop")
        log = server.run(2, run, config)[0] if mounted else server.run(2, limited, config, 40_000)[0]
        assert "checkpoint.on_save_error=stop" in log.splitlines()[-1] and log.splitlines()[-1].startswith("megadsl: ")
    finally:
        if mounted:
            subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize("damage", ["flipped bit", "cut short", "no manifest", "missing file", "all"])
def test_falls_back_to_the_newest_complete_one_and_says_why(server, small_data, tmp_path, damage):
    server.run(2, run, configured(small_data, tmp_path, 6, save_interval=3))
    newest = tmp_path / "checkpoints" / "iteration-0000006"
    file = next((newest / "exp_avg").glob("*"))
    if damage == "flipped bit":
        data = bytearray(file.read_bytes())
        data[-5] ^= 1
        file.write_bytes(data)
    elif damage == "cut short":
        file.write_bytes(file.read_bytes()[:-1])
    elif damage == "missing file":
        file.unlink()
    else:
        for folder in ([newest] if damage == "no manifest" else newest.parent.glob("iteration-*")):
            (folder / "manifest.json").unlink()
    log = server.run(2, run, configured(small_data, tmp_path, 8))[0]
    if damage == "all":
        assert "No checkpoint in" in log.splitlines()[-1] and "move the folder away" in log.splitlines()[-1]
        return
    [warning] = [line for line in log.splitlines() if line.startswith("warning: ")]
    assert str(newest) in warning and "going back to" in warning and "iteration-0000003" in warning
    assert {"flipped bit": "does not fit its checksum", "cut short": "instead of", "no manifest": "manifest.json cannot be read",
            "missing file": "is missing"}[damage] in warning
    assert "resuming after iteration 3" in log and len(curve(tmp_path)) == 8


def test_a_second_run_in_the_folder_is_refused(server, small_data, tmp_path):
    """The first one is stopped, not dead; once it is killed its lock is taken over."""
    with ForkServer() as other:
        first = other.start(1, run, configured(small_data, tmp_path, 100000, save_interval=1))
        deadline = time.monotonic() + 60
        while not announced(tmp_path) and time.monotonic() < deadline:
            time.sleep(0.02)
        os.kill(first[0], signal.SIGSTOP)
        log = server.run(1, run, configured(small_data, tmp_path, 100000))[0]
        assert f"is in use by process {first[0]} on" in log.splitlines()[-1] and "another training.run_dir" in log.splitlines()[-1]
        os.kill(first[0], signal.SIGKILL)
        other.results()
    done = announced(tmp_path)
    log = server.run(1, run, configured(small_data, tmp_path, done + 3))[0]
    assert f"took over the lock of process {first[0]}" in log and announced(tmp_path) == done + 3
    assert not (tmp_path / "checkpoints" / ".lock").exists()


class Malicious:
    """Writes a file when it is unpickled."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def command(arguments: list[str]) -> str:
    """The sentence that a command of `megadsl` ends with; what else escapes fails the test."""
    from megadsl.cli.main import app

    try:
        with contextlib.redirect_stdout(io.StringIO()):
            app(arguments, standalone_mode=False)
    except UserError as error:
        return str(error)
    return ""


def test_nothing_that_is_read_can_run_code(server, small_data, tmp_path):
    """A malicious pickle in place of each file of a checkpoint, tokenizer and dataset, in turn; the manifest is made to fit it too."""
    from megadsl.config import save_config

    data = tmp_path / "dataset"
    shutil.copytree(small_data.dataset, data)
    shutil.copyfile(small_data.tokenizer, tmp_path / "tokenizer.model")
    run_dir, marker, ran = tmp_path / "run", tmp_path / "marker", 0
    config = configured(small_data, run_dir, 2)
    config = config.model_copy(update={
        "tokenizer": config.tokenizer.model_copy(update={"model": str(tmp_path / "tokenizer.model")}),
        "data": type(config.data).model_validate({**config.data.model_dump(), "datasets": [str(data)]}),
        "training": config.training.model_copy(update={"train_iters": 3}),
    })
    server.run(1, run, config.model_copy(update={"training": config.training.model_copy(update={"train_iters": 2})}))
    save_config(config, tmp_path / "config.yaml")
    checkpoint = run_dir / "checkpoints" / "iteration-0000002"
    payload = pickle.dumps(Malicious(marker))
    (tmp_path / "proof").mkdir()
    pickle.loads(pickle.dumps(Malicious(tmp_path / "proof" / "it-works")))
    assert (tmp_path / "proof" / "it-works").exists()
    train = ["train", str(tmp_path / "config.yaml")]
    evaluate = ["evaluate", str(checkpoint), "--data", str(data), "--max-tokens", "200", "--device", "cpu"]
    files = [file for file in [*checkpoint.rglob("*"), *data.glob("*"), tmp_path / "tokenizer.model"] if file.is_file()]
    assert len(files) >= 12
    for file in files:
        original = file.read_bytes()
        for fitting in ([False, True] if checkpoint in file.parents and file.name != "manifest.json" else [False]):
            file.write_bytes(payload)
            manifest = read_manifest(checkpoint) if fitting else None
            if fitting:
                name = str(file.relative_to(checkpoint))
                record = FileRecord(record_of(file).bytes, record_of(file).sha256, manifest.files[name].tensors)
                write_manifest(checkpoint, Manifest(manifest.info, {**manifest.files, name: record}))
            commands = [train, evaluate]
            if checkpoint in file.parents:
                commands.append(["checkpoint", "inspect", str(checkpoint)])
            if file.name == "stats.json":  # a resumed run has its plan from the checkpoint
                commands.append(["plan", str(tmp_path / "config.yaml")])
            sentences = [server.run(1, command, arguments)[0] for arguments in commands]
            if manifest:
                write_manifest(checkpoint, manifest)
            assert not marker.exists(), f"{file} ran code"
            assert any(sentences), f"{file}: no command noticed"
            assert all("\n" not in sentence for sentence in sentences)
            ran += 1
            # A resume that did not need the file may have gone on; start from the same place.
            for extra in (run_dir / "checkpoints").glob("iteration-0000003"):
                shutil.rmtree(extra)
        file.write_bytes(original)
    assert ran >= 16
