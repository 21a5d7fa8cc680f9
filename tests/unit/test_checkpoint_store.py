"""Folders of checkpoints: complete or not there, the newest is found, old ones go; what can be made of them; the lock."""

import json
import os
import subprocess
import time
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from megadsl.checkpoint.inspect import diff, inspect
from megadsl.checkpoint.lock import STALE_SECONDS, RunLock
from megadsl.checkpoint.manifest import CheckpointInfo, DamagedCheckpoint, damaged_files, read_manifest
from megadsl.checkpoint.reshape import average, reshape
from megadsl.checkpoint.store import CheckpointStore, open_checkpoint, write_small_files
from megadsl.checkpoint.weights import KINDS, TensorReader, read_weights, write_tensors
from megadsl.config.load import parse_config
from megadsl.errors import UserError
from megadsl.tasks.planning import plan_for_run
from megadsl.tasks.trained import entries_of_checkpoint

CONFIG = parse_config({"model": {"num_layers": 2, "hidden_size": 16, "num_attention_heads": 2}})
INFO = CheckpointInfo(0, 0, 0, 3.5, 2, 1, 1, 1, 512, "hash", {"torch": "2"}, optimizer_steps=7)
NAMES = ("embedding.word.table.weight", "decoder.0.mlp.linear_fc1.weight", "decoder.1.mlp.linear_fc1.weight", "final_norm.weight")


def tensors(value: float):
    for kind in KINDS:
        for index, name in enumerate(NAMES):
            yield kind, name, torch.full((8, 4), float(value) + index)


def commit(store: CheckpointStore, iteration: int, value: float = 1.0, keep_last: int = 2, keep_every: int = 0):
    staging = store.begin(iteration)
    files, error = write_tensors(staging, "rank-00000", tensors(value), file_bytes=300)
    assert error is None
    files |= write_small_files(staging, CONFIG, plan_for_run(CONFIG), {"tokenizer.model": b"a tokenizer", "labels.json": b"[]"})
    final = store.commit(replace(INFO, iteration=iteration, consumed_samples=8 * iteration), files)
    store.prune(iteration, keep_last, keep_every)
    return final


def kept(store: CheckpointStore) -> list[int]:
    return [checkpoint.info.iteration for checkpoint in store.complete()]


def test_round_trip(tmp_path):
    store = CheckpointStore(tmp_path / "run" / "checkpoints")
    store.folder.mkdir(parents=True)
    for iteration in (10, 20):
        commit(store, iteration, value=iteration)
    for path in (tmp_path / "run", store.folder, store.path(20)):
        checkpoint = open_checkpoint(path)
        assert checkpoint.info.iteration == 20 and checkpoint.info.consumed_samples == 160
        assert checkpoint.config() == CONFIG and checkpoint.plan() == plan_for_run(CONFIG)
        assert checkpoint.tokenizer.read_bytes() == b"a tokenizer"
        assert checkpoint.task_files() == {"tokenizer.model": b"a tokenizer", "labels.json": b"[]"}
    assert len(list((checkpoint.path / "weights").glob("*"))) == 2, "files are of bounded size"
    for index, (name, tensor) in enumerate(read_weights(checkpoint.path)):
        assert name == NAMES[index] and torch.equal(tensor, torch.full((8, 4), 20.0 + index))
    from safetensors.torch import load_file  # what others read it with

    assert set().union(*(load_file(file) for file in (checkpoint.path / "exp_avg").glob("*"))) == set(NAMES)
    assert (store.folder / "latest").read_text() == "iteration-0000020"


def test_pruning(tmp_path):
    store = CheckpointStore(tmp_path)
    for iteration in range(10, 110, 10):
        commit(store, iteration, keep_every=40)
    assert kept(store) == [40, 80, 90, 100]
    # A run that went back behind a newer one never removes what it has just saved.
    commit(store, 70, keep_last=1)
    assert kept(store) == [70, 80, 90, 100]
    assert [path.name for path in tmp_path.glob(".*")] == []


@pytest.mark.parametrize("damage, named", [
    (lambda path: (path / "manifest.json").unlink(), "manifest.json cannot be read"),
    (lambda path: (path / "manifest.json").write_text("{}"), "own checksum"),
    (lambda path: (path / "manifest.json").write_text((path / "manifest.json").read_text().replace('"loss": 3.5', '"loss": 3.4')), "own checksum"),
    (lambda path: (path / "manifest.json").write_text("[" * 100_000), "not JSON"),
    (lambda path: (path / "plan.json").write_text("{" + (path / "plan.json").read_text()[1:-1] + " "), "plan.json does not fit"),
    (lambda path: (path / "tokenizer.model").unlink(), "tokenizer.model is missing"),
    (lambda path: (path / "labels.json").write_bytes(b"[1"), "labels.json"),
    (lambda path: next((path / "exp_avg").glob("*")).write_bytes(b""), "0 bytes instead of"),
])
def test_what_is_damaged_does_not_exist_and_is_named(tmp_path, damage, named):
    store = CheckpointStore(tmp_path)
    good, bad = commit(store, 10), commit(store, 20)
    damage(bad)
    newest, problems = store.newest_usable({})
    assert newest.path == good and list(problems) == [bad] and named in problems[bad]
    assert open_checkpoint(tmp_path).path == good
    with pytest.raises(UserError, match="no complete checkpoint"):
        open_checkpoint(bad)
    report = inspect(bad)
    assert not report["complete"] and report["problems"]
    (good / "manifest.json").unlink()
    with pytest.raises(UserError, match="move the folder away"):
        store.newest_usable({})


def test_no_checkpoint_at_all(tmp_path):
    store = CheckpointStore(tmp_path)
    store.begin(20)  # killed while writing
    assert store.newest_usable({}) == (None, {}) and store.latest() is None
    with pytest.raises(UserError, match="no complete checkpoint"):
        open_checkpoint(tmp_path)


def test_manifest_cannot_reach_out_of_its_folder(tmp_path):
    good = commit(CheckpointStore(tmp_path), 10)
    from megadsl.data.atomic_files import fingerprint

    values = json.loads((good / "manifest.json").read_text())
    values["files"]["../../etc/passwd"] = values["files"]["plan.json"]
    values.pop("sha256")
    (good / "manifest.json").write_text(json.dumps({**values, "sha256": fingerprint(values)}))
    with pytest.raises(DamagedCheckpoint, match="outside of the checkpoint"):
        read_manifest(good)


def test_average_is_the_mean_and_has_no_optimizer(tmp_path):
    store = CheckpointStore(tmp_path)
    paths = [commit(store, iteration, value, keep_last=5) for iteration, value in ((10, 1.0), (20, 2.0), (30, 6.0))]
    output = average(paths, tmp_path / "mean" / "iteration-0000030")
    checkpoint = open_checkpoint(output)
    assert checkpoint.info.optimizer_steps is None and checkpoint.info.iteration == 30
    assert {name: float(tensor[0, 0]) for name, tensor in read_weights(output)} == {name: 3.0 + i for i, name in enumerate(NAMES)}
    assert not (output / "exp_avg").exists()
    with pytest.raises(UserError, match="exists already"):
        average(paths, output)


def test_average_of_a_runs_last_checkpoints(tmp_path):
    from megadsl.cli.checkpoint import app

    store = CheckpointStore(tmp_path / "run" / "checkpoints")
    for iteration, value in ((10, 1.0), (20, 2.0), (30, 6.0)):
        commit(store, iteration, value, keep_last=5)
    run, output = str(tmp_path / "run"), tmp_path / "mean" / "iteration-0000030"
    done = CliRunner().invoke(app, ["average", run, "--last", "2", "--output", str(output)])
    assert done.exit_code == 0, done.output
    assert {name: float(tensor[0, 0]) for name, tensor in read_weights(output)} == {name: 4.0 + i for i, name in enumerate(NAMES)}
    for arguments, words in (([run, "--last", "4"], "has 3 checkpoints, not 4"), ([run, run, "--last", "2"], "2 paths are given")):
        done = CliRunner().invoke(app, ["average", *arguments, "--output", str(tmp_path / "other")])
        assert isinstance(done.exception, UserError) and words in str(done.exception), done.output


def test_diff_orders_by_relative_difference(tmp_path):
    store = CheckpointStore(tmp_path)
    a, b = (open_checkpoint(commit(store, iteration, value)) for iteration, value in ((10, 1.0), (20, 2.0)))
    found = diff(a, b)
    assert [one.key for one in found["weights"]] == list(NAMES)
    assert [one.relative for one in found["weights"]] == pytest.approx([1.0, 1 / 2, 1 / 3, 1 / 4])
    assert found["config"] == found["plan"] == diff(a, a)["weights"] == []


def test_reshape_cuts_by_stages_and_keeps_every_tensor(tmp_path):
    source = commit(CheckpointStore(tmp_path), 10)
    output = reshape(source, tmp_path / "out", entries_of_checkpoint, tensor=2, pipeline=2)
    checkpoint = open_checkpoint(output)
    assert (checkpoint.info.tensor, checkpoint.info.pipeline, checkpoint.info.zero_stage) == (2, 2, 1)
    assert checkpoint.config().parallel.tensor_model_parallel_size == 2 and not damaged_files(output, checkpoint.manifest)
    stages = {name: file.split("/")[1][:9] for name, file in checkpoint.manifest.tensor_files("exp_avg").items()}
    assert stages == dict(zip(NAMES, ("stage-000", "stage-000", "stage-001", "stage-001"), strict=True))
    with TensorReader(source, read_manifest(source)) as before, TensorReader(output, checkpoint.manifest) as after:
        for kind in KINDS:
            assert all(torch.equal(before.tensor(kind, name), after.tensor(kind, name)) for name in NAMES)
    with pytest.raises(UserError, match="num_attention_heads 2 is not divisible"):
        reshape(source, tmp_path / "other", entries_of_checkpoint, tensor=3, pipeline=1)


def test_a_reader_holds_no_more_than_it_is_asked_for(tmp_path):
    """120 MB of tensors are re-cut by a process that never holds 60 MB of memory of its own."""
    code = f"""
import resource, torch
from pathlib import Path
from megadsl.checkpoint.manifest import CheckpointInfo, Manifest
from megadsl.checkpoint.weights import TensorReader, write_tensors
folder, out = Path({str(tmp_path)!r}) / "a", Path({str(tmp_path)!r}) / "b"
folder.mkdir(), out.mkdir()
files, _ = write_tensors(folder, "x", (("weights", f"t{{i}}", torch.full((1 << 20,), float(i))) for i in range(30)), 16 << 20)
def own():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")) // 1024
start, most = own(), 0
with TensorReader(folder, Manifest(None, files)) as reader:
    def copied():
        global most
        for name in reader.names("weights"):
            yield "weights", name, reader.tensor("weights", name)
            most = max(most, own())
    write_tensors(out, "y", copied(), 16 << 20)
print(most - start)
"""
    done = subprocess.run([os.sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 60


def test_commands(tmp_path):
    from megadsl.cli.checkpoint import app

    store, runner = CheckpointStore(tmp_path / "run" / "checkpoints"), CliRunner()
    store.folder.mkdir(parents=True)
    a, b = commit(store, 10, 1.0), commit(store, 20, 2.0)
    shown = runner.invoke(app, ["inspect", str(tmp_path / "run")])
    assert shown.exit_code == 0 and "iteration 20, 160 samples, loss 3.5000, 7 optimizer steps" in shown.output
    assert "128 parameters, scheme dslm" in shown.output
    report = json.loads(runner.invoke(app, ["inspect", str(b), "--json"]).output)
    assert report["complete"] and report["parameters"] == 128 and report["tensors"] == dict.fromkeys(KINDS, 4)
    (b / "plan.json").unlink()
    shown = runner.invoke(app, ["inspect", str(tmp_path / "run")])
    assert shown.exit_code == 1 and "NOT COMPLETE" in shown.output and "plan.json cannot be read" in shown.output
    shown = runner.invoke(app, ["diff", str(a), str(a)])
    assert shown.exit_code == 0 and "weights: 0 differences" in shown.output


def test_lock(tmp_path, monkeypatch):
    held = RunLock(tmp_path)
    with pytest.raises(UserError, match=f"in use by process {os.getpid()}"):
        RunLock(tmp_path)
    record = json.loads((tmp_path / ".lock").read_text())
    held.release()
    assert not list(tmp_path.iterdir())

    def lock_of(**changes):
        (tmp_path / ".lock").write_text(json.dumps({**record, "host": "elsewhere", "job": "7", **changes}))

    lock_of()
    with pytest.raises(UserError, match="on elsewhere, SLURM job 7"):
        RunLock(tmp_path)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")  # requeued
    taken = RunLock(tmp_path)
    assert "an earlier start of this job" in taken.note
    taken.release()
    lock_of(job=None)
    old = time.time() - 2 * STALE_SECONDS
    os.utime(tmp_path / ".lock", (old, old))
    taken = RunLock(tmp_path)
    assert "no sign of life" in taken.note
    taken.release()
    for text in ("{", "", json.dumps({**record, "started": "1"})):
        (tmp_path / ".lock").write_text(text)
        RunLock(tmp_path).release()
