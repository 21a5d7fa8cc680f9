"""Command line of the data room: the whole path, and one sentence with exit code 2 for a user's mistake."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from small_data import library
from typer.testing import CliRunner

from megadsl.cli.main import app
from megadsl.config.load import save_config

ROOT = Path(__file__).parents[2]


def megadsl(*arguments, cwd, code=0):
    command = [sys.executable, "-m", "megadsl", *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == code, done.stderr
    return done


def test_from_text_to_dataset_and_again(tmp_path):
    steps = [
        ("data", "corpus", *library("email", "json"), "--output", "corpus", "--max-document-chars", "4000"),
        ("tokenizer", "train", "--corpus", "corpus", "--output", "t.model", "--vocab-size", "512"),
        ("data", "preprocess", "--corpus", "corpus", "--tokenizer", "t.model", "--output", "dataset", "--workers", "2"),
    ]
    for step in steps:
        done = megadsl(*step, cwd=tmp_path)
        assert "written" in done.stdout and re.search(r": done in \d+\.\d s\n", done.stderr) and "\r" not in done.stderr
    assert "Transformer Engine" not in done.stderr and "Warning" not in done.stderr
    for step in steps:
        assert "used again" in megadsl(*step, cwd=tmp_path).stdout
    statistics = json.loads(megadsl("data", "stats", "dataset", "--seq-length", "64", cwd=tmp_path).stdout)
    assert statistics == json.loads((tmp_path / "dataset/stats.json").read_text()) and statistics["seq_length"] == 64
    shown = megadsl("tokenizer", "inspect", "t.model", "--text", "def \u2581<mask>", cwd=tmp_path).stdout
    assert "comes back exactly" in shown and "pad 0" in shown and "'<0xE2>'" in shown


@pytest.mark.parametrize(("arguments", "words"), [
    (("data", "corpus", "nowhere", "--output", "c"), "'nowhere' matches no text"),
    (("data", "corpus", "--output", "c", "--test-fraction", "1.5"), "must add up to 1"),
    (("tokenizer", "train", "--corpus", "c", "--output", "t.model"), "c is no corpus; make one with: megadsl data corpus"),
    (("tokenizer", "inspect", "t.model"), "t.model cannot be read"),
    (("data", "preprocess", "--corpus", "c", "--tokenizer", "t.model", "--output", "d"), "t.model cannot be read"),
    (("data", "stats", "d"), "d is no dataset; make one with megadsl data preprocess"),
])
def test_a_mistake_is_one_sentence_and_exit_code_2(tmp_path, arguments, words):
    done = megadsl(*arguments, cwd=tmp_path, code=2)
    assert done.stderr.startswith("megadsl: ") and words in done.stderr and done.stderr.count("\n") == 1 and not done.stdout


@pytest.mark.parametrize(
    ("script", "verb"), [("preprocess_data.py", "data preprocess"), ("train_tokenizer.py", "tokenizer train")],
)
def test_tools_are_the_same_commands(tmp_path, script, verb):
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / script, "--help"], cwd=tmp_path, capture_output=True, text=True, check=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert verb in done.stdout and "--corpus" in done.stdout


def test_show_prints_what_is_read_and_what_is_predicted(small_data, tmp_path):
    model = {"family": "encoder", "num_tokentypes": 2, "seq_length": 64}
    save_config(small_data.config(tmp_path, model=model, task={"sentence_order": True}), tmp_path / "run.yaml")
    shown = CliRunner().invoke(app, ["data", "show", str(tmp_path / "run.yaml"), "--samples", "3"]).stdout
    assert shown.startswith("masked tokens, 15% as pieces, and the order of two halves | train: ")
    samples = re.split(r"\nsample \d: 9 of 64 labels count\n", shown)[1:]
    assert len(samples) == 3
    for sample in samples:
        rows = dict(re.findall(r"^(\w+) +(.*?) *$", re.sub(r"\n +", " ", sample), flags=re.MULTILINE))
        assert list(rows) == ["tokens", "tokentypes", "labels", "sentence_order"] and rows["sentence_order"] in ("0", "1")
        assert rows["tokens"].startswith("<cls> ") and rows["tokens"].endswith(" <sep>") and rows["tokens"].count("<sep>") == 2
        marked = re.findall(r"\u00ab\S+\u00bb(?: \u00d7(\d+))?", rows["tokens"])
        assert sum(int(times or 1) for times in marked) == 9 == len(rows["labels"].replace("\u2026", "").split())
    save_config(small_data.config(tmp_path, model={"family": "encoder_decoder", "seq_length": 64}), tmp_path / "pairs.yaml")
    shown = CliRunner().invoke(app, ["data", "show", str(tmp_path / "pairs.yaml"), "--split", "validation"]).stdout
    assert "span corruption, 15% in spans of 3 on average | validation: " in shown
    assert shown.count("<extra_id_0>") == 2 * 3 and shown.count("source_tokens") == 2, "source, target_tokens and labels have it"
    assert shown.endswith("\n78% of every target is padding; model.decoder_seq_length=14 is enough.\n")


def test_every_command_of_the_documentation_runs(tmp_path):
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "docs/data.md").read_text(), flags=re.DOTALL)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    command = ["bash", "-euc", "".join(blocks)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert len(blocks) == 4 and done.stdout.count("written") == 5 and "comes back exactly" in done.stdout
    mixed, plain = (json.loads((tmp_path / folder / "corpus.json").read_text()) for folder in ("mixed", "corpus"))
    assert mixed["files"] == plain["files"] + 2, "the glob names a file that the folder has already given"
