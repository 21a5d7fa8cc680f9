"""Images: the same losses and gradients in every layout, exact resumption with mixup and CutMix, evaluation from the checkpoint alone."""

import shutil
from pathlib import Path

import pytest
from image_data import image_config, prepared, write_class_folders
from layout_runs import (
    LAYOUTS, REFERENCE, curve, evaluated, parallel_section, require_same_curve_and_exact_resumption, require_same_on_two_processes, train,
)
from ranks import ForkServer

from megadsl.config import Config

RUNS = {"class token": {}, "mean, post-norm": {"model": {"norm_position": "post", "seq_length": 9, "position_embedding_type": "sinusoidal"},
                                               "task": {"pooling": "mean"}}}
RUN_LAYOUTS = [*(("class token", layout) for layout in LAYOUTS), *(("mean, post-norm", layout) for layout in LAYOUTS[:2])]


@pytest.fixture(scope="module")
def server():
    with ForkServer() as started:
        yield started


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return prepared(tmp_path_factory.mktemp("images"))


def configured(images: Path, run_dir: Path, run: str, layout=REFERENCE, **sections: dict) -> Config:
    return image_config(images, run_dir, parallel=parallel_section(layout), **RUNS[run], **sections)


@pytest.fixture(scope="module")
def references(server, images, tmp_path_factory) -> dict[str, Config]:
    folder, found = tmp_path_factory.mktemp("image runs"), {}
    for number, run in enumerate(RUNS):
        found[run] = configured(images, folder / str(number), run)
        said = server.run(1, train, found[run])[0]
        assert "image_classification: 4 layers x 32" in said and "| top1 accuracy " in said and "signal at iteration 0" in said
    return found


@pytest.mark.parametrize("run, layout", RUN_LAYOUTS, ids=str)
def test_trains_the_same_and_resumes_exactly_in_every_layout(server, images, references, tmp_path, run, layout):
    config = configured(images, tmp_path / "run", run, layout, checkpoint={"save_interval": 10})
    expected = curve(references[run])
    assert len(expected) == 20 and expected[-1][0] < expected[0][0]
    require_same_curve_and_exact_resumption(server, config, layout, expected)


def test_learns_and_evaluates_the_same_on_any_number_of_processes(server, images, tmp_path):
    """Also where the data of training are gone: sizes, classes and normalisation lie beside the checkpoint."""
    moved = shutil.copytree(images, tmp_path / "training")
    config = configured(moved, tmp_path / "run", "class token", training={"train_iters": 60},
                        task={"mixup_alpha": 0.0, "cutmix_alpha": 0.0, "crop_padding": 0, "horizontal_flip": False})
    server.run(1, train, config)
    shutil.rmtree(moved)
    run_dir, request = config.training.run_dir, {"batch_tokens": 100, "data": str(images)}
    one = server.run(1, evaluated, run_dir, 1, request)[0]
    assert one["samples"] == 60 and one["top1_accuracy"] > 0.9 and one["top5_accuracy"] == 1.0 and 0.0 <= one["calibration_error"] < 0.6
    require_same_on_two_processes(server, run_dir, request, one)


def test_robustness_is_reported_by_corruption_and_severity(server, references, tmp_path):
    for severity in (1, 4):
        folder = write_class_folders(tmp_path / "corrupted" / "fog" / str(severity), 12, channels=1)
        for path in sorted(folder.iterdir()):
            path.rename(folder / path.name.removeprefix("class-"))
    asked = {"corruptions": True, "max_samples": 3}, {"corrupted": tmp_path / "corrupted", "figures": tmp_path / "figures"}
    run_dir = references["class token"].training.run_dir
    own, read = (server.run(1, evaluated, run_dir, 1, {"batch_tokens": 100, **one})[0] for one in asked)
    assert len(own["corruptions"]) == 15 and all(list(row) == ["1", "2", "3", "4", "5"] for row in own["corruptions"].values())
    every = [value for row in own["corruptions"].values() for value in row.values()]
    assert own["corrupted_accuracy"] == pytest.approx(sum(every) / 75)
    assert own["relative_drop"] == pytest.approx(1 - own["corrupted_accuracy"] / own["top1_accuracy"])
    assert list(read["corruptions"]) == ["fog"] and list(read["corruptions"]["fog"]) == ["1", "4"]
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {"confusion.png", "calibration.png", "corruptions.png"}
