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
