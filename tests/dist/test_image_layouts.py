"""Images: the same losses and gradients in every layout, exact resumption with mixup and CutMix, evaluation from the checkpoint alone."""

import contextlib
import io
import json
import shutil
from pathlib import Path

import pytest
from image_data import image_config, prepared, write_class_folders
from ranks import ForkServer

from megadsl.checkpoint.manifest import read_manifest
from megadsl.checkpoint.store import open_checkpoint
from megadsl.config import Config

# (tensor, pipeline, data, ZeRO)
REFERENCE = (1, 1, 1, 0)
RUNS = {"class token": {}, "mean, post-norm": {"model": {"norm_position": "post", "seq_length": 9, "position_embedding_type": "sinusoidal"},
                                               "task": {"pooling": "mean"}}}
LAYOUTS = [("class token", (2, 1, 1, 1)), ("class token", (1, 2, 1, 1)), ("class token", (1, 1, 2, 3)), ("mean, post-norm", (2, 1, 1, 1)),
           ("mean, post-norm", (1, 2, 1, 1))]


@pytest.fixture(scope="module")
def server():
    with ForkServer() as started:
        yield started


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return prepared(tmp_path_factory.mktemp("images"))


def configured(images: Path, run_dir: Path, run: str, layout=REFERENCE, **sections: dict) -> Config:
    tensor, pipeline, _, zero = layout
    parallel = {"tensor_model_parallel_size": tensor, "pipeline_model_parallel_size": pipeline, "zero_stage": zero}
    return image_config(images, run_dir, parallel=parallel, **RUNS[run], **sections)


def train(config: Config) -> str:
    from megadsl.training.loop import train as run

    with contextlib.redirect_stdout(io.StringIO()) as said:
        run(config)
    return said.getvalue()


def curve(config: Config) -> list[tuple[float, float]]:
    rows = [json.loads(line) for line in (Path(config.training.run_dir) / "metrics.jsonl").read_text().splitlines()]
    return [(row["train/loss"], row["train/grad_norm"]) for row in rows if "train/loss" in row]


@pytest.fixture(scope="module")
def references(server, images, tmp_path_factory) -> dict[str, Config]:
    folder, found = tmp_path_factory.mktemp("image runs"), {}
    for number, run in enumerate(RUNS):
        found[run] = configured(images, folder / str(number), run)
        said = server.run(1, train, found[run])[0]
        assert "image_classification: 4 layers x 32" in said and "| top1 accuracy " in said and "signal at iteration 0" in said
    return found


@pytest.mark.parametrize("run, layout", LAYOUTS, ids=str)
def test_trains_the_same_and_resumes_exactly_in_every_layout(server, images, references, tmp_path, run, layout):
    world = layout[0] * layout[1] * layout[2]
    config = configured(images, tmp_path / "run", run, layout, checkpoint={"save_interval": 10})
    server.run(world, train, config)
    expected = curve(references[run])
    assert len(expected) == 20 and expected[-1][0] < expected[0][0]
    for column in range(2):
        assert [row[column] for row in curve(config)] == pytest.approx([row[column] for row in expected], rel=1e-5)
    checkpoints = tmp_path / "run" / "checkpoints"
    straight = read_manifest(checkpoints / "iteration-0000020").files
    shutil.rmtree(checkpoints / "iteration-0000020")
    assert "resuming after iteration 10" in server.run(world, train, config)[0]
    resumed = read_manifest(checkpoints / "iteration-0000020").files
    assert {name: file.sha256 for name, file in resumed.items()} == {name: file.sha256 for name, file in straight.items()}


def evaluated(run_dir: str, tensor: int, **asked) -> dict:
    from megadsl.parallel.groups import destroy_groups
    from megadsl.parallel.launch import discover_launch
    from megadsl.tasks.task import EvaluationRequest
    from megadsl.tasks.trained import load_trained

    task, model = load_trained(open_checkpoint(run_dir), "cpu", tensor_parallel=tensor, launch=discover_launch())
    results = task.evaluate(model, EvaluationRequest(batch_tokens=100, **asked))
    destroy_groups()
    return results


def test_learns_and_evaluates_the_same_on_any_number_of_processes(server, images, tmp_path):
    """Also where the data of training are gone: sizes, classes and normalisation lie beside the checkpoint."""
    moved = shutil.copytree(images, tmp_path / "training")
    config = configured(moved, tmp_path / "run", "class token", training={"train_iters": 60},
                        task={"mixup_alpha": 0.0, "cutmix_alpha": 0.0, "crop_padding": 0, "horizontal_flip": False})
    server.run(1, train, config)
    shutil.rmtree(moved)
    one = server.run(1, _evaluated_on, config.training.run_dir, 1, str(images))[0]
    assert one["samples"] == 60 and one["top1_accuracy"] > 0.9 and one["top5_accuracy"] == 1.0 and 0.0 <= one["calibration_error"] < 0.6
    for world, tensor in ((2, 1), (2, 2)):
        for results in server.run(world, _evaluated_on, config.training.run_dir, tensor, str(images)):
            assert results == pytest.approx(one, rel=1e-6)


def _evaluated_on(run_dir: str, tensor: int, data: str) -> dict:
    return evaluated(run_dir, tensor, data=data)


def _evaluated_corrupted(run_dir: str, folder: Path, figures: Path) -> list[dict]:
    own = evaluated(run_dir, 1, corruptions=True, max_samples=3)
    return [own, evaluated(run_dir, 1, corrupted=folder, figures=figures)]


def test_robustness_is_reported_by_corruption_and_severity(server, references, tmp_path):
    for severity in (1, 4):
        folder = write_class_folders(tmp_path / "corrupted" / "fog" / str(severity), 12, channels=1)
        for path in sorted(folder.iterdir()):
            path.rename(folder / path.name.removeprefix("class-"))
    own, read = server.run(1, _evaluated_corrupted, references["class token"].training.run_dir, tmp_path / "corrupted", tmp_path / "figures")[0]
    assert len(own["corruptions"]) == 15 and all(list(row) == ["1", "2", "3", "4", "5"] for row in own["corruptions"].values())
    every = [value for row in own["corruptions"].values() for value in row.values()]
    assert own["corrupted_accuracy"] == pytest.approx(sum(every) / 75)
    assert own["relative_drop"] == pytest.approx(1 - own["corrupted_accuracy"] / own["top1_accuracy"])
    assert list(read["corruptions"]) == ["fog"] and list(read["corruptions"]["fog"]) == ["1", "4"]
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {"confusion.png", "calibration.png", "corruptions.png"}
