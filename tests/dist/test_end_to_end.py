"""The user's path by the commands that the README names: corpus -> tokenizer -> dataset -> 2-process training -> kill ->
resume -> evaluate -> generate. The resumed curve equals an undisturbed one bit for bit, with dropout on.
"""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from ranks import ForkServer, free_port

from megadsl.config import save_config

BIN = Path(sys.executable).parent
LIBRARY = Path(sysconfig.get_paths()["stdlib"])
TRAIN_ITERS = 60


def megadsl(*arguments: str) -> str:
    return subprocess.run([BIN / "megadsl", *arguments], check=True, capture_output=True, text=True, timeout=300).stdout


@pytest.fixture(scope="module")
def config_file(tmp_path_factory, small_data) -> Path:
    """Corpus, tokenizer and dataset by the command line, and a config with dropout on them."""
    folder = tmp_path_factory.mktemp("end-to-end")
    megadsl("data", "corpus", str(LIBRARY / "email"), str(LIBRARY / "json"), "--output", str(folder / "corpus"),
            "--max-document-chars", "4000")
    megadsl("tokenizer", "train", "--corpus", str(folder / "corpus"), "--output", str(folder / "tokenizer.model"),
            "--vocab-size", "512", "--type", "bpe")
    megadsl("data", "preprocess", "--corpus", str(folder / "corpus"), "--tokenizer", str(folder / "tokenizer.model"),
            "--output", str(folder / "dataset"))
    validation = json.loads((folder / "dataset" / "dataset.json").read_text())["splits"]["validation"]["tokens"]
    config = small_data.config(
        folder / "run", model={"hidden_dropout": 0.1, "attention_dropout": 0.1},
        tokenizer={"model": str(folder / "tokenizer.model")}, data={"datasets": [str(folder / "dataset")]},
        training={"train_iters": TRAIN_ITERS, "eval_interval": 15, "micro_batch_size": 2, "eval_iters": validation // (32 * 8)},
        checkpoint={"save_interval": 10}, monitor={"log_interval": 1, "tensorboard": True},
    )
    save_config(config, folder / "config.yaml")
    return folder / "config.yaml"


def launch(launcher: str, config: Path, run_dir: Path) -> subprocess.Popen:
    port = str(free_port())
    commands = {
        "deepspeed": [BIN / "deepspeed", "--num_accelerators", "2", "--master_port", port, "--module", "megadsl"],
        "torchrun": [BIN / "torchrun", "--nproc_per_node", "2", "--master_port", port, "-m", "megadsl"],
    }
    return subprocess.Popen(
        [*commands[launcher], "train", str(config), f"training.run_dir={run_dir}"], stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, start_new_session=True, env={**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}"},
    )


def curve(run_dir: Path) -> list[tuple]:
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [(row["iteration"], row["train/loss"], row["train/grad_norm"], row["train/lr"]) for row in rows if "train/loss" in row]


def descendants(process: int) -> list[int]:
    """A process and all that it started and its children started, as far as they run."""
    parents = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            parents[int(entry.parent.name)] = int(entry.read_text().rpartition(")")[2].split()[1])
    found = [process]
    for one in found:
        found += [child for child, parent in parents.items() if parent == one]
    return found


@pytest.fixture(scope="module")
def killed_and_resumed(config_file) -> Path:
    """A run by the deepspeed launcher, killed with SIGKILL after its first checkpoint, resumed by torchrun."""
    run_dir = config_file.parent / "killed"
    process = launch("deepspeed", config_file, run_dir)
    seen = []
    for line in process.stdout:
        seen.append(line)
        if re.search(r"iteration +1[3-9]/", line):
            break
    # The launcher puts ranks into sessions of their own: kill it and all that it started, by their ids.
    for started in descendants(process.pid):
        os.kill(started, signal.SIGKILL)
    process.wait()
    assert any("saved" in line for line in seen), "".join(seen)
    assert len(curve(run_dir)) < TRAIN_ITERS, "it must be killed before its end"
    resumed = launch("torchrun", config_file, run_dir)
    output, _ = resumed.communicate(timeout=300)
    assert resumed.returncode == 0, output
    assert "resuming after iteration" in output
    return run_dir


def test_resumed_curve_is_the_undisturbed_one(config_file, killed_and_resumed):
    straight = config_file.parent / "straight"
    process = launch("torchrun", config_file, straight)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert len(curve(straight)) == TRAIN_ITERS
    assert curve(killed_and_resumed) == curve(straight)


def test_event_files_hold_the_curve(killed_and_resumed):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(killed_and_resumed / "tensorboard" / killed_and_resumed.name)).Reload()
    points = {event.step: event.value for event in events.Scalars("loss/train")}
    assert points == pytest.approx({iteration: loss for iteration, loss, *_ in curve(killed_and_resumed)}, rel=1e-6)
    assert events.Scalars("loss/validation")


def test_evaluate_and_generate(config_file, killed_and_resumed):
    data = config_file.parent / "dataset"
    result = json.loads(megadsl("evaluate", str(killed_and_resumed), "--data", str(data), "--split", "validation", "--json"))
    rows = [json.loads(line) for line in (killed_and_resumed / "metrics.jsonl").read_text().splitlines()]
    # The run's validation covers the split but for a rest of some windows.
    assert result["loss"] == pytest.approx([row["validation/loss"] for row in rows if "validation/loss" in row][-1], abs=0.05)
    assert result["loss"] < max(row["train/loss"] for row in rows if "train/loss" in row) - 1, "it must have learnt"
    assert result["bits_per_byte"] == pytest.approx(result["loss"] / 0.6931472 * result["tokens"] / result["text_bytes"], rel=1e-4)
    text = megadsl("generate", str(killed_and_resumed), "--prompt", "def ", "--max-new-tokens", "8", "--greedy")
    assert text.startswith("def ") and len(text) > len("def \n")
    assert text == megadsl("generate", str(killed_and_resumed), "--prompt", "def ", "--max-new-tokens", "8", "--top-k", "1")


def test_export_by_the_command(killed_and_resumed, tmp_path):
    """The folder loads with transformers alone; that it gives our logits the export itself has checked and says."""
    transformers = pytest.importorskip("transformers", reason="needs package transformers")
    output = megadsl("checkpoint", "export", str(killed_and_resumed), str(tmp_path / "exported"))
    assert float(re.search(r"difference of logits ([0-9.e-]+)", output)[1]) < 1e-4
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "exported")
    assert type(model).__name__ == "GPT2LMHeadModel"
    assert (tmp_path / "exported" / "README.md").read_text().count("dslm") >= 1


def test_a_run_starts_from_the_weights_of_another(small_data, tmp_path):
    """checkpoint.init_from: the first loss goes on where the other run ended, the optimizer and the counts start anew."""
    first = small_data.config(tmp_path / "first")
    then = small_data.config(
        tmp_path / "then", checkpoint={"init_from": str(tmp_path / "first")}, training={"train_iters": 3},
        model={"hidden_dropout": 0.1}, parallel={"zero_stage": 2},
    )
    with ForkServer() as server:
        server.run(1, _train, first)
        server.run(2, _train, then)
        fresh = _losses(tmp_path / "first")
        assert abs(_losses(tmp_path / "then")[0] - fresh[-1]) < 0.4 < fresh[0] - fresh[-1]
        for change, named in (({"num_layers": 4}, "model.num_layers"), ({"activation": "relu"}, "model.activation")):
            wrong = small_data.config(tmp_path / "wrong", checkpoint={"init_from": str(tmp_path / "first")}, model=change)
            assert named in server.run(1, _refusal, wrong)[0]
        missing = small_data.config(tmp_path / "wrong", checkpoint={"init_from": str(tmp_path / "nowhere")})
        assert "nowhere" in server.run(1, _refusal, missing)[0]


def _train(config) -> None:
    from megadsl.training.loop import train

    train(config)


def _refusal(config) -> str:
    from megadsl.errors import UserError

    try:
        _train(config)
    except UserError as error:
        return str(error)
    raise AssertionError("nothing was refused")


def _losses(run_dir) -> list[float]:
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [row["train/loss"] for row in rows if "train/loss" in row]
