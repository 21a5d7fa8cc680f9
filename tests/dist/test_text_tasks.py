"""Text classification, multiple choice and span questions: the same losses in every layout, exact resuming, evaluation on any ranks."""

import contextlib
import io
import json
import shutil
from pathlib import Path

import pytest
from ranks import ForkServer
from text_data import KINDS, make

from megadsl.checkpoint.manifest import read_manifest
from megadsl.checkpoint.store import open_checkpoint
from megadsl.config import Config

# (tensor, pipeline, data, ZeRO)
REFERENCE = (1, 1, 1, 0)
LAYOUTS = [(2, 1, 1, 1), (1, 2, 1, 1), (1, 1, 2, 3)]


@pytest.fixture(scope="module")
def server():
    with ForkServer() as started:
        yield started


@pytest.fixture(scope="module")
def folders(small_data, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("texts")
    return {name: make(name, folder / name, small_data.tokenizer) for name in KINDS}


def configured(small_data, data: Path, task: str, run_dir: Path, layout=REFERENCE, **sections: dict) -> Config:
    tensor, pipeline, _, zero = layout
    options = {"question_answering": {"doc_stride": 12, "max_query_length": 8}}.get(task, {})
    model = {"family": "encoder", "num_layers": 4, "num_tokentypes": 2, **sections.pop("model", {})}
    return small_data.config(
        run_dir, model=model, task={"name": task, **options}, data={"datasets": [str(data)]}, optimizer={"lr": 5e-4, "adam_eps": 1e-6}, training={"train_iters": 12},
        parallel={"tensor_model_parallel_size": tensor, "pipeline_model_parallel_size": pipeline, "zero_stage": zero}, **sections)


def train(config: Config) -> str:
    from megadsl.training.loop import train as run

    with contextlib.redirect_stdout(io.StringIO()) as said:
        run(config)
    return said.getvalue()


def curve(config: Config) -> list[tuple[float, float]]:
    rows = [json.loads(line) for line in (Path(config.training.run_dir) / "metrics.jsonl").read_text().splitlines()]
    return [(row["train/loss"], row["train/grad_norm"]) for row in rows if "train/loss" in row]


@pytest.fixture(scope="module")
def references(server, small_data, folders, tmp_path_factory) -> dict[str, Config]:
    runs = tmp_path_factory.mktemp("text runs")
    configs = {name: configured(small_data, folders[name], name, runs / name) for name in KINDS}
    for name, config in configs.items():
        said = server.run(1, train, config)[0]
        assert f"{name}: 4 layers x 32" in said and "validation loss" in said and "padding" in said
    return configs


@pytest.mark.parametrize("task", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_trains_the_same_and_resumes_exactly_in_every_layout(server, small_data, folders, references, tmp_path, task, layout):
    world = layout[0] * layout[1] * layout[2]
    config = configured(small_data, folders[task], task, tmp_path / "run", layout, checkpoint={"save_interval": 6})
    server.run(world, train, config)
    expected = curve(references[task])
    assert len(expected) == 12 and sum(loss for loss, _ in expected[-5:]) < sum(loss for loss, _ in expected[:5])
    for column in range(2):
        assert [row[column] for row in curve(config)] == pytest.approx([row[column] for row in expected], rel=1e-5)
    checkpoints = tmp_path / "run" / "checkpoints"
    straight = read_manifest(checkpoints / "iteration-0000012").files
    shutil.rmtree(checkpoints / "iteration-0000012")
    assert "resuming after iteration 6" in server.run(world, train, config)[0]
    resumed = read_manifest(checkpoints / "iteration-0000012").files
    assert {name: file.sha256 for name, file in resumed.items()} == {name: file.sha256 for name, file in straight.items()}


def evaluated(run_dir: str, tensor: int) -> dict:
    from megadsl.parallel.groups import destroy_groups
    from megadsl.parallel.launch import discover_launch
    from megadsl.tasks.task import EvaluationRequest
    from megadsl.tasks.trained import load_trained

    task, model = load_trained(open_checkpoint(run_dir), "cpu", tensor_parallel=tensor, launch=discover_launch())
    results = task.evaluate(model, EvaluationRequest(split="validation", batch_tokens=256))
    destroy_groups()
    return results


@pytest.mark.parametrize("task", KINDS)
def test_evaluates_the_same_on_any_number_of_processes(server, references, task):
    run_dir = references[task].training.run_dir
    one = server.run(1, evaluated, run_dir, 1)[0]
    assert one[{"question_answering": "questions"}.get(task, "samples")] == {"text_classification": 30, "multiple_choice": 18}.get(task, 14)
    for world, tensor in ((2, 1), (2, 2)):
        for results in server.run(world, evaluated, run_dir, tensor):
            assert results == pytest.approx(one, rel=1e-6)


@pytest.mark.parametrize("layout", [REFERENCE, (2, 1, 1, 1), (1, 1, 2, 3)], ids=str)
def test_frozen_layers_stay_and_the_others_learn_by_their_depth(server, small_data, folders, references, tmp_path, layout):
    """From a trained run: embedding and two layers as they were, bit for bit; a step of the others in the ratio of their rates."""
    from safetensors.torch import load_file

    trunk = references["text_classification"].training.run_dir
    # Adam's first step is lr x sign of the gradient, where eps is nothing beside it.
    config = configured(
        small_data, folders["text_classification"], "text_classification", tmp_path / "run", layout, checkpoint={"init_from": trunk})
    config = config.model_copy(update={
        "optimizer": config.optimizer.model_copy(update={
            "lr": 1e-3, "layer_lr_decay": 0.5, "weight_decay": 0.0, "lr_warmup_iters": 0, "adam_eps": 1e-20, "lr_decay_style": "constant"}),
        "training": config.training.model_copy(update={"train_iters": 1, "freeze_layers": 2})})
    said = next(filter(None, server.run(layout[0] * layout[1] * layout[2], train, config)))
    assert "tensors taken" in said and "stands still" not in said

    def weights(run_dir):
        return {name: tensor for file in (open_checkpoint(run_dir).path / "weights").glob("*.safetensors") for name, tensor in load_file(file).items()}

    before, after = weights(trunk), weights(tmp_path / "run")
    moved = {name: (after[name] - before[name]).abs().median().item() for name in before}
    frozen = {name for name in before if name.startswith(("embedding", "encoder.0.", "encoder.1."))}
    assert frozen and all(moved[name] == 0.0 for name in frozen)
    for prefix, factor in (("encoder.2.mlp.linear_fc1.weight", 0.25), ("encoder.3.mlp.linear_fc1.weight", 0.5), ("classifier.linear.weight", 1.0)):
        assert moved[prefix] == pytest.approx(1e-3 * factor, rel=1e-2)
