"""Translation of text is trained, resumed and evaluated the same in every layout, and learns to translate words that it was shown."""

from pathlib import Path

import pytest
from layout_runs import (
    LAYOUTS, REFERENCE, curve, evaluated, parallel_section, require_same_curve_and_exact_resumption, require_same_hypotheses, train,
)
from parallel_data import write_parallel
from ranks import ForkServer

from megadsl.config import Config


@pytest.fixture(scope="module")
def server():
    with ForkServer() as started:
        yield started


@pytest.fixture(scope="module")
def sentences(tmp_path_factory) -> Path:
    return write_parallel(tmp_path_factory.mktemp("parallel"))


def configured(small_data, data: Path, run_dir: Path, layout=REFERENCE, **sections: dict) -> Config:
    model = {"family": "encoder_decoder", "num_layers": 2, "num_decoder_layers": 2, "seq_length": 48, "decoder_seq_length": 48}
    return small_data.config(
        run_dir, model=model, data={"datasets": [str(data)]}, tokenizer={"model": str(data / "tokenizer.model")},
        task={"name": "translation", "label_smoothing": 0.1, "bucket_batches": 2}, parallel=parallel_section(layout),
        training={"train_iters": 12, **sections.pop("training", {})}, **sections)


@pytest.fixture(scope="module")
def reference(server, small_data, sentences, tmp_path_factory) -> Config:
    config = configured(small_data, sentences, tmp_path_factory.mktemp("translation runs") / "reference")
    said = server.run(1, train, config)[0]
    assert "translation: 2 + 2 layers x 32" in said and "| token accuracy " in said and "padding" in said
    return config


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_trains_the_same_and_resumes_exactly_in_every_layout(server, small_data, sentences, reference, tmp_path, layout):
    config = configured(small_data, sentences, tmp_path / "run", layout, checkpoint={"save_interval": 6})
    expected = curve(reference)
    assert expected[-1][0] < 0.8 * expected[0][0]
    require_same_curve_and_exact_resumption(server, config, layout, expected)


def test_evaluates_the_same_on_any_number_of_processes(server, reference, tmp_path):
    request = {"batch_tokens": 200, "num_beams": 3}
    one, written = require_same_hypotheses(server, reference.training.run_dir, request, tmp_path)
    assert one["samples"] == len(written) == 12 and "version:" in one["bleu_signature"]


def test_learns_to_translate(server, small_data, sentences, tmp_path):
    config = configured(small_data, sentences, tmp_path / "run", training={"train_iters": 700, "micro_batch_size": 32, "global_batch_size": 32},
                        optimizer={"lr": 5e-3, "lr_warmup_iters": 20})
    server.run(1, train, config)
    results = server.run(1, evaluated, config.training.run_dir, 1, {"split": "test"})[0]
    assert results["bleu"] > 50
