"""`megadsl diagnose` from a folder to the page and the numbers: a run of ours, what we exported, what transformers saved."""

import json
import os
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from megadsl.cli.main import app
from megadsl.errors import UserError


@pytest.fixture
def verb():
    """Call a verb in this process; its process group and launch variables are gone afterwards."""
    before = dict(os.environ)

    def call(*arguments) -> str:
        from megadsl.parallel.groups import destroy_groups

        try:
            result = CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=False)
        finally:
            destroy_groups()
            os.environ.clear()
            os.environ.update(before)
        assert result.exit_code == 0, result.output
        return result.stdout

    return call


@pytest.fixture
def diagnose(verb, tmp_path):
    """The numbers of a diagnosis, and what was "printed"."""
    def call(*arguments) -> dict:
        output = tmp_path / "out" / "diagnosis.html"
        printed = verb("diagnose", *arguments, "--device", "cpu", "--output", output)
        assert output.stat().st_size > 50_000
        return json.loads(output.with_suffix(".json").read_text()) | {"printed": printed}

    return call


def test_a_run_of_ours(diagnose, trained_runs, small_data):
    found = diagnose(trained_runs["dslm"], "--samples", 8)
    assert found["facts"]["scheme"] == "dslm" and found["facts"]["samples"] == 8 and "unfolded" in found["facts"]["scalars"]
    assert len(found["points"]) == 14 and len(found["heads"]["entropy"]) == 6 and len(found["skips"]) > 6
    assert 0 < found["effective_depth"] <= 6 and "nearest plan" in found["printed"]
    one = json.loads(diagnose(trained_runs["dslm"], "--samples", 4, "--skips", 0, "--json", "--data", small_data.dataset)["printed"])
    assert one["skips"] == [] and one["loss"] == pytest.approx(found["loss"], rel=0.2)


def test_what_we_exported_is_the_same_model_folded(diagnose, trained_runs, small_data, tmp_path):
    pytest.importorskip("transformers", reason="needs package transformers")
    from megadsl.checkpoint.huggingface.export import export_huggingface
    from megadsl.checkpoint.store import open_checkpoint
    from megadsl.parallel.groups import destroy_groups
    from megadsl.tasks.export import export_source

    before = dict(os.environ)
    export_huggingface(export_source(open_checkpoint(trained_runs["dslm"])), tmp_path / "hf")
    destroy_groups()
    os.environ.clear()
    os.environ.update(before)
    ours = diagnose(trained_runs["dslm"], "--samples", 8, "--data", small_data.dataset)
    theirs = diagnose(tmp_path / "hf", "--samples", 8, "--data", small_data.dataset)
    assert theirs["facts"]["source"] == "Hugging Face" and "folded" in theirs["facts"]["scalars"]
    assert theirs["loss"] == pytest.approx(ours["loss"], rel=1e-4)
    # Folding scales the stream and leaves directions, attention and what layers are worth as they were.
    for quantity in ("token_correlation", "angular_distance", "attention_entropy", "attention_logit_max"):
        for a, b in zip(theirs["signal"][quantity], ours["signal"][quantity], strict=True):
            assert a == b or a == pytest.approx(b, rel=1e-2, abs=1e-3), quantity
    for a, b in zip(theirs["skips"], ours["skips"], strict=True):
        assert a["loss_increase"] == pytest.approx(b["loss_increase"], abs=1e-4)
    assert theirs["signal"]["forward_second_moment"][-2] > 2 * ours["signal"]["forward_second_moment"][-2]
    assert not list(Path(os.environ.get("TMPDIR", "/tmp")).glob("megadsl-diagnose-*/checkpoint"))


def test_a_model_that_transformers_made(diagnose, small_data, tmp_path):
    transformers = pytest.importorskip("transformers", reason="needs package transformers")
    config = transformers.GPT2Config(vocab_size=512, n_positions=32, n_embd=256, n_layer=6, n_head=4, resid_pdrop=0.0)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    shutil.copy(small_data.tokenizer, tmp_path / "gpt2" / "tokenizer.model")
    found = diagnose(tmp_path / "gpt2", "--data", small_data.dataset, "--split", "test")
    assert found["facts"]["layers"] == "6 decoder" and found["facts"]["scheme"] is None
    # GPT-2's own initialisation is what the vanilla plan describes.
    assert found["fits"][0]["scheme"] == "vanilla" and found["fits"][0]["forward_error"] < 0.2


def test_bad_input_is_a_sentence(diagnose, trained_runs, small_data, tmp_path):
    def refused(*arguments) -> str:
        with pytest.raises(UserError) as error:
            diagnose(*arguments)
        return str(error.value)

    assert "is no folder" in refused(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "no complete checkpoint" in refused(tmp_path / "empty")
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text('{"model_type": "mamba"}')
    assert "mamba" in refused(tmp_path / "hf", "--data", small_data.dataset)
    assert "--tokenizer goes with" in refused(trained_runs["dslm"], "--tokenizer", small_data.tokenizer)
    assert "matches no text" in refused(trained_runs["dslm"], "--data", tmp_path / "nothing.txt")
    (tmp_path / "short.txt").write_text("a")
    assert "give more text" in refused(trained_runs["dslm"], "--data", tmp_path / "short.txt")
    with pytest.raises(UserError, match="must end in .html"):
        CliRunner().invoke(app, ["diagnose", str(trained_runs["dslm"]), "--output", str(tmp_path / "a.pdf")], catch_exceptions=False)


def test_evaluation_and_sample_come_into_the_report(verb, trained_runs, small_data, tmp_path):
    run = shutil.copytree(trained_runs["dslm"], tmp_path / "run")
    verb("evaluate", run, "--data", small_data.dataset, "--max-tokens", 200, "--output", run / "evaluation.json")
    written = verb("generate", run, "--prompt", "def ", "--max-new-tokens", 4, "--output", run / "sample.txt")
    verb("report", run)
    assert (run / "sample.txt").read_text() == written and "perplexity" in json.loads((run / "evaluation.json").read_text())
    page = (run / "report.html").read_text()
    assert "<dt>perplexity</dt>" in page and "<h3>Sample</h3>" in page and "There is no" not in page.partition("Evaluation and a sample</h2>")[2]
