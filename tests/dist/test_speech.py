"""Speech translation is planned, trained, resumed and evaluated the same in every layout."""

import contextlib
import io
import json
import shutil
from pathlib import Path

import pytest
from ranks import ForkServer
from speech_data import write_speech

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
def utterances(tmp_path_factory) -> Path:
    return write_speech(tmp_path_factory.mktemp("speech"), words=(1, 3))


def configured(small_data, data: Path, run_dir: Path, layout=REFERENCE, **sections: dict) -> Config:
    tensor, pipeline, _, zero = layout
    model = {"family": "encoder_decoder", "num_layers": 2, "num_decoder_layers": 2, "seq_length": 20, "decoder_seq_length": 20}
    return small_data.config(
        run_dir, model=model, data={"datasets": [str(data)]}, tokenizer={"model": str(data / "tokenizer.model")},
        task={"name": "speech_translation", "conv_channels": 24, "time_mask_width": 10, "bucket_batches": 2},
        parallel={"tensor_model_parallel_size": tensor, "pipeline_model_parallel_size": pipeline, "zero_stage": zero},
        training={"train_iters": 12}, **sections)


def train(config: Config) -> str:
    from megadsl.training.loop import train as run

    with contextlib.redirect_stdout(io.StringIO()) as said:
        run(config)
    return said.getvalue()


def curve(config: Config) -> list[tuple[float, float]]:
    rows = [json.loads(line) for line in (Path(config.training.run_dir) / "metrics.jsonl").read_text().splitlines()]
    return [(row["train/loss"], row["train/grad_norm"]) for row in rows if "train/loss" in row]


@pytest.fixture(scope="module")
def reference(server, small_data, utterances, tmp_path_factory) -> Config:
    config = configured(small_data, utterances, tmp_path_factory.mktemp("speech runs") / "reference")
    said = server.run(1, train, config)[0]
    assert "speech_translation: 2 + 2 layers x 32" in said and "| token accuracy " in said and "padding" in said
    return config


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_trains_the_same_and_resumes_exactly_in_every_layout(server, small_data, utterances, reference, tmp_path, layout):
    world = layout[0] * layout[1] * layout[2]
    config = configured(small_data, utterances, tmp_path / "run", layout, checkpoint={"save_interval": 6})
    server.run(world, train, config)
    expected = curve(reference)
    assert expected[-1][0] < 0.8 * expected[0][0]
    for column in range(2):
        assert [row[column] for row in curve(config)] == pytest.approx([row[column] for row in expected], rel=1e-5)
    checkpoints = tmp_path / "run" / "checkpoints"
    straight = read_manifest(checkpoints / "iteration-0000012").files
    shutil.rmtree(checkpoints / "iteration-0000012")
    said = server.run(world, train, config)[0]
    assert "resuming after iteration 6" in said
    resumed = read_manifest(checkpoints / "iteration-0000012").files
    assert {name: file.sha256 for name, file in resumed.items()} == {name: file.sha256 for name, file in straight.items()}


def evaluated(run_dir: str, tensor: int, hypotheses: str) -> dict:
    from megadsl.parallel.groups import destroy_groups
    from megadsl.parallel.launch import discover_launch
    from megadsl.tasks.task import EvaluationRequest
    from megadsl.tasks.trained import load_trained

    task, model = load_trained(open_checkpoint(run_dir), "cpu", tensor_parallel=tensor, launch=discover_launch())
    results = task.evaluate(model, EvaluationRequest(batch_tokens=200, num_beams=3, hypotheses=hypotheses))
    destroy_groups()
    return results


def test_evaluates_the_same_on_any_number_of_processes(server, reference, tmp_path):
    run_dir = reference.training.run_dir
    one = server.run(1, evaluated, run_dir, 1, str(tmp_path / "one.jsonl"))[0]
    written = [json.loads(line) for line in (tmp_path / "one.jsonl").read_text().splitlines()]
    assert one["samples"] == len(written) == 12 and one["num_beams"] == 3 and "version:" in one["bleu_signature"]
    assert written[0]["id"] == "test-0" and set(written[0]) == {"id", "reference", "hypothesis", "score"}
    for world, tensor in ((2, 1), (2, 2)):
        for results in server.run(world, evaluated, run_dir, tensor, str(tmp_path / "two.jsonl")):
            numbers = {name: value for name, value in one.items() if not isinstance(value, str)}
            assert {name: results[name] for name in numbers} == pytest.approx(numbers, rel=1e-5)
        again = [json.loads(line) for line in (tmp_path / "two.jsonl").read_text().splitlines()]
        assert [row["hypothesis"] for row in again] == [row["hypothesis"] for row in written]
