"""`megadsl report` and `megadsl compare` on real runs, whole and damaged."""

import json
import math
import shutil
import socket

import numpy as np
import pytest
from typer.testing import CliRunner

from megadsl.cli.main import app
from megadsl.errors import UserError
from megadsl.monitor.pages.run_comparison import read_runs, run_comparison
from megadsl.monitor.pages.run_data import RunData
from megadsl.monitor.pages.run_report import run_report
from megadsl.monitor.signal import PREDICTED, SignalRecord, points_header, points_of, predicted


@pytest.fixture
def run_dir(trained_runs, tmp_path):
    """A copy that a test may change."""
    return shutil.copytree(trained_runs["dslm"], tmp_path / "dslm")


def write_signal(run_dir, factors: dict[int, float]) -> None:
    """signal.jsonl: at every iteration the plan's numbers, the second moment of addition 3 times a factor."""
    plan = RunData.read(run_dir).plan
    lines = [points_header(points_of(plan))]
    for iteration, factor in factors.items():
        values = {quantity: predicted(plan, quantity) for quantity in PREDICTED}
        values["forward_second_moment"] = np.where(np.arange(len(plan.sublayers) + 2) == 4, factor, 1.0) * values["forward_second_moment"]
        lines.append(SignalRecord(iteration, values).to_json())
    (run_dir / "signal.jsonl").write_text("\n".join(lines) + "\n")


def text_of(run_dir) -> str:
    return run_report(RunData.read(run_dir)).html()


def test_report_of_a_whole_run(run_dir):
    write_signal(run_dir, {0: 1.0, 6: 3.0, 12: 7.0})
    (run_dir / "alarms.jsonl").write_text(json.dumps({"iteration": 7, "alarm": "loss_spike", "where": "loss", "text": "up <9>", "z": 8.1}) + "\n")
    (run_dir / "evaluation.json").write_text('{"loss": 4.25, "perplexity": 70.1}')
    (run_dir / "sample.txt").write_text("def answer():\n    return 42\n")
    (run_dir / "slurm.json").write_text('{"job": "17", "restarts": 2, "nodes": "n[1-2]", "started": 1.0}\n')
    html = text_of(run_dir)
    for words in ("12 of 12", "causal language modeling", "6 decoder", "loss_spike", "up &lt;9&gt;", "8.1", "4.25", "return 42", "SLURM job 17, restart 2",
                  "iteration-0000006", "complete", "model.num_layers", "before the first step", "iteration 12", "decoder.1.ffn"):
        assert words in html, words
    # The point that was moved is the one that is farthest from the plan, by the factor that it was moved by.
    worst = html[html.index("The points farthest from the plan"):]
    first = worst[worst.index("<tr><td"):]
    assert first.startswith('<tr><td class="text">forward second moment</td><td class="text">decoder.1.ffn</td>')
    assert first[:first.index("</tr>")].endswith(">7</td>")
    assert "Not there or not readable" not in html
    starts = html[html.index("Starts and restarts"):html.index("Throughput</h2>")]
    assert socket.gethostname() in starts and "there are none" not in starts


def test_report_says_what_is_missing(run_dir):
    for name in ("plan.json", "metrics.jsonl"):
        (run_dir / name).unlink()
    shutil.rmtree(run_dir / "checkpoints")
    shutil.rmtree(run_dir / "tensorboard")
    html = text_of(run_dir)
    for words in ("metrics.jsonl is not there", "plan.json is not there", "No iteration is recorded yet", "There are none.", "evaluation.json"):
        assert words in html, words


FILES = ("plan.json", "metrics.jsonl", "signal.jsonl", "alarms.jsonl", "evaluation.json", "slurm.json")


@pytest.mark.parametrize("names", [FILES, ("signal.jsonl",)], ids=["all", "signal"])
@pytest.mark.parametrize("content", ['{"a": 1}\n{"b"', "\xff\xfe nonsense", "[1, 2]\n[3]\n", '{"points": [{"name": 1, "x": 2}]}\n{"iteration": 1}\n'])
def test_a_damaged_file_is_a_line_and_no_traceback(run_dir, names, content):
    for name in names:
        (run_dir / name).write_text(content, encoding="latin-1")
    html = text_of(run_dir)
    assert "Configuration" in html and "Not there or not readable" in html


def test_a_damaged_checkpoint_is_named(run_dir):
    weights = next((run_dir / "checkpoints" / "iteration-0000012" / "weights").iterdir())
    weights.write_bytes(weights.read_bytes()[:-1])
    html = text_of(run_dir)
    assert "bytes instead of" in html and html.count(">complete<") == 1


def test_tokens_and_time_grow_with_the_run(trained_runs):
    run = RunData.read(trained_runs["dslm"])
    iterations = np.array([0.0, 5.0, 12.0])
    tokens, seconds = run.tokens(iterations), run.seconds(iterations)
    per_iteration = run.config.training.global_batch_size * run.config.model.seq_length
    np.testing.assert_allclose(tokens, iterations * per_iteration, rtol=1e-6)
    logged = run.series("throughput/seconds_per_iteration")[1]
    assert math.isclose(seconds[-1], 2 * logged.sum()) and 0 < seconds[1] < seconds[2]


def test_comparison(trained_runs, tmp_path):
    copy = shutil.copytree(trained_runs["dslm"], tmp_path / "other" / "dslm")
    write_signal(copy, {0: 1.0, 12: 2.0})
    unmeasured = shutil.copytree(trained_runs["vanilla"], tmp_path / "vanilla")
    (unmeasured / "signal.jsonl").unlink()
    runs = read_runs([trained_runs["dslm"], unmeasured, copy])
    html = run_comparison(runs).html()
    assert len({run.label for run in runs}) == 3 and "other/dslm" in html
    for words in ("scheme.name", "&quot;dslm&quot;", "&quot;vanilla&quot;", "loss by tokens read", "loss by seconds of training", "No signal was measured in"):
        assert words in html, words
    assert "training.run_dir</td>" not in html


def test_cli(trained_runs, tmp_path):
    def run(*arguments) -> str:
        result = CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.stdout

    assert "Report: " in run("report", trained_runs["dslm"], "--output", tmp_path / "a" / "r.html")
    assert "Comparison: " in run("compare", *trained_runs.values(), "--output", tmp_path / "c.html")
    assert all((tmp_path / name).stat().st_size > 20_000 for name in ("a/r.html", "c.html"))


def test_bad_input_is_a_sentence(trained_runs, tmp_path):
    def refused(*arguments) -> str:
        with pytest.raises(UserError) as error:
            CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=False)
        return str(error.value)

    assert "is no run folder" in refused("report", tmp_path / "nowhere") and not (tmp_path / "nowhere").exists()
    assert "two or more" in refused("compare", trained_runs["dslm"])
    assert "named twice" in refused("compare", trained_runs["dslm"], trained_runs["dslm"])
    assert "cannot be written" in refused("report", trained_runs["dslm"], "--output", trained_runs["dslm"] / "config.yaml" / "r.html")
