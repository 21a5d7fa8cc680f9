"""Exact resume and change of layout, through the whole of `megadsl train`: the curve goes on as if nothing had happened.

Processes are forked from one that has everything imported. (tensor, pipeline, data, ZeRO) is a layout.
"""

import contextlib
import io
import json
import shutil
from pathlib import Path

import pytest
from ranks import ForkServer

from megadsl.checkpoint.manifest import read_manifest
from megadsl.checkpoint.reshape import average
from megadsl.checkpoint.store import open_checkpoint
from megadsl.config import Config

Layout = tuple[int, int, int, int]
LAYOUTS = [(1, 1, 1, 0), (2, 1, 1, 1), (1, 2, 1, 1), (1, 1, 2, 2), (1, 1, 2, 3), (2, 2, 1, 1)]
CHANGES = [
    ((1, 1, 2, 3), (1, 1, 2, 1)), ((1, 1, 2, 1), (1, 1, 2, 3)), ((2, 1, 1, 1), (1, 2, 1, 1)), ((1, 2, 1, 1), (1, 1, 1, 1)),
    ((1, 1, 2, 1), (2, 1, 1, 2)), ((1, 1, 2, 0), (1, 1, 2, 2)), ((2, 2, 1, 1), (1, 1, 1, 0)), ((1, 1, 1, 0), (2, 1, 1, 3)),
]
MODEL = {"num_layers": 4, "hidden_size": 16, "num_attention_heads": 2, "activation": "swiglu"}


@pytest.fixture(scope="module")
def server():
    with ForkServer() as started:
        yield started


def configured(small_data, run_dir: Path, layout: Layout, iterations: int, dropout: float, precision: str = "fp32", **checkpoint) -> Config:
    tensor, pipeline, _, zero = layout
    return small_data.config(
        run_dir, model={**MODEL, "hidden_dropout": dropout, "attention_dropout": dropout},
        parallel={"tensor_model_parallel_size": tensor, "pipeline_model_parallel_size": pipeline, "zero_stage": zero},
        optimizer={"lr_decay_iters": 40}, training={"train_iters": iterations, "eval_iters": 0, "precision": precision}, checkpoint=checkpoint,
    )


def run(config: Config) -> str:
    """What the run said."""
    from megadsl.training.loop import train

    with contextlib.redirect_stdout(io.StringIO()) as said:
        train(config)
    return said.getvalue()


def curve(run_dir: Path) -> list[tuple]:
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [(row["iteration"], row["train/loss"], row["train/grad_norm"], row["train/lr"]) for row in rows if "train/loss" in row]


def state_of(checkpoint: Path) -> dict[str, str]:
    """Checksums of weights and moments."""
    return {name: record.sha256 for name, record in read_manifest(checkpoint).files.items() if name.endswith(".safetensors")}


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_twenty_and_twenty_are_forty_bit_for_bit(server, small_data, tmp_path, layout):
    """Dropout on. Another process after 20 iterations; curve, schedule, weights and moments are equal to the last bit."""
    world = layout[0] * layout[1] * layout[2]
    server.run(world, run, configured(small_data, tmp_path / "straight", layout, 40, 0.1, save_interval=20))
    shutil.copytree(tmp_path / "straight", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / "checkpoints" / "iteration-0000040")
    server.run(world, run, configured(small_data, tmp_path / "resumed", layout, 40, 0.1))
    assert len(curve(tmp_path / "straight")) == 40
    assert curve(tmp_path / "resumed") == curve(tmp_path / "straight")
    last = [tmp_path / name / "checkpoints" / "iteration-0000040" for name in ("straight", "resumed")]
    assert state_of(last[0]) == state_of(last[1])
    assert {name.split("/")[0] for name in state_of(last[0])} == {"weights", "exp_avg", "exp_avg_sq"}


@pytest.mark.parametrize("layout", [(1, 1, 2, 1), (1, 1, 2, 3), (1, 2, 1, 1)], ids=str)
def test_sixteen_bits_resume_bit_for_bit(server, small_data, tmp_path, layout):
    """The 16-bit weights of the resumed run are the rounded master weights, or its next losses would differ."""
    for name, lengths in (("straight", (10,)), ("resumed", (5, 10))):
        for length in lengths:
            server.run(2, run, configured(small_data, tmp_path / name, layout, length, 0.1, "bf16"))
    assert len(curve(tmp_path / "straight")) == 10 and curve(tmp_path / "resumed") == curve(tmp_path / "straight")
    last = [state_of(tmp_path / name / "checkpoints" / "iteration-0000010") for name in ("straight", "resumed")]
    assert last[0] == last[1]


def test_an_average_trains_on_with_a_new_optimizer(server, small_data, tmp_path):
    server.run(2, run, configured(small_data, tmp_path / "run", (1, 1, 2, 2), 10, 0.0, save_interval=5))
    saved = [tmp_path / "run" / "checkpoints" / f"iteration-{iteration:07d}" for iteration in (5, 10)]
    average(saved, tmp_path / "mean" / "checkpoints" / "iteration-0000010")
    [said] = server.run(1, run, configured(small_data, tmp_path / "mean", (1, 1, 1, 0), 20, 0.0))
    assert "has no optimizer state: the optimizer starts anew" in said
    losses = [loss for _, loss, *_ in curve(tmp_path / "run") + curve(tmp_path / "mean")]
    # A fresh start would repeat the first ten. Batches scatter by .1, so the difference of two means has a deviation of .04.
    assert len(losses) == 20 and sum(losses[10:]) / 10 < sum(losses[:10]) / 10 - 0.12
    assert open_checkpoint(tmp_path / "mean").info.optimizer_steps == 10


@pytest.fixture(scope="module")
def undisturbed(server, small_data, tmp_path_factory):
    """20 iterations in one go."""
    folder = tmp_path_factory.mktemp("undisturbed")
    server.run(1, run, configured(small_data, folder, (1, 1, 1, 0), 20, 0.0))
    return curve(folder)


@pytest.mark.parametrize("before, after", CHANGES, ids=str)
def test_another_layout_continues_the_curve(server, small_data, tmp_path, undisturbed, before, after):
    server.run(before[0] * before[1] * before[2], run, configured(small_data, tmp_path, before, 10, 0.0))
    server.run(after[0] * after[1] * after[2], run, configured(small_data, tmp_path, after, 20, 0.0))
    found = curve(tmp_path)
    assert [row[0] for row in found] == list(range(1, 21))
    for column in (1, 2, 3):
        assert [row[column] for row in found] == pytest.approx([row[column] for row in undisturbed], rel=1e-5)
