"""Speech translation is planned, trained, resumed and evaluated the same in every layout."""

from pathlib import Path

import pytest
from layout_runs import (
    LAYOUTS, REFERENCE, curve, parallel_section, require_same_curve_and_exact_resumption, require_same_hypotheses, train,
)
from ranks import ForkServer
from speech_data import write_speech

from megadsl.config import Config


@pytest.fixture(scope="module")
def server():
    with ForkServer() as started:
        yield started


@pytest.fixture(scope="module")
def utterances(tmp_path_factory) -> Path:
    return write_speech(tmp_path_factory.mktemp("speech"), words=(1, 3))


def configured(small_data, data: Path, run_dir: Path, layout=REFERENCE, **sections: dict) -> Config:
    model = {"family": "encoder_decoder", "num_layers": 2, "num_decoder_layers": 2, "seq_length": 20, "decoder_seq_length": 20}
    return small_data.config(
        run_dir, model=model, data={"datasets": [str(data)]}, tokenizer={"model": str(data / "tokenizer.model")},
        task={"name": "speech_translation", "conv_channels": 24, "time_mask_width": 10, "bucket_batches": 2},
        parallel=parallel_section(layout),
        training={"train_iters": 12}, **sections)


@pytest.fixture(scope="module")
def reference(server, small_data, utterances, tmp_path_factory) -> Config:
    config = configured(small_data, utterances, tmp_path_factory.mktemp("speech runs") / "reference")
    said = server.run(1, train, config)[0]
    assert "speech_translation: 2 + 2 layers x 32" in said and "| token accuracy " in said and "padding" in said
    return config


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_trains_the_same_and_resumes_exactly_in_every_layout(server, small_data, utterances, reference, tmp_path, layout):
    config = configured(small_data, utterances, tmp_path / "run", layout, checkpoint={"save_interval": 6})
    expected = curve(reference)
    assert expected[-1][0] < 0.8 * expected[0][0]
    require_same_curve_and_exact_resumption(server, config, layout, expected)


def test_evaluates_the_same_on_any_number_of_processes(server, reference, tmp_path):
    request = {"batch_tokens": 200, "num_beams": 3}
    one, written = require_same_hypotheses(server, reference.training.run_dir, request, tmp_path)
    assert one["samples"] == len(written) == 12 and one["num_beams"] == 3 and "version:" in one["bleu_signature"]
    assert written[0]["id"] == "test-0" and set(written[0]) == {"id", "reference", "hypothesis", "score"}
