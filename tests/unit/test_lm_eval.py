"""An exported decoder runs in lm-evaluation-harness, a kept library, on a task file of ours."""

import importlib.util
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

needs_lm_eval = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None or importlib.util.find_spec("accelerate") is None,
                                   reason="needs package lm_eval (pip install lm_eval[hf])")


@needs_lm_eval
def test_an_export_is_evaluated_by_lm_eval(trained_runs, tmp_path):
    from megadsl.checkpoint.huggingface.export import export_huggingface
    from megadsl.checkpoint.store import open_checkpoint
    from megadsl.tasks.export import export_source

    export_huggingface(export_source(open_checkpoint(trained_runs["dslm"])), tmp_path / "model")
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    shutil.copy(Path(__file__).parents[1] / "lm_eval" / "next_line.yaml", tasks)
    rng, lines = random.Random(0), ["import json", "import email", "def load(path):", "class Parser:", "return self", "for line in file:"]
    rows = [{"line": (chosen := rng.sample(lines, 3))[0], "lines": chosen[1:], "right": rng.randrange(2)} for _ in range(12)]
    (tasks / "next_line.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    offline = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-m", "lm_eval", "--model", "hf", "--model_args", f"pretrained={tmp_path / 'model'},dtype=float32", "--tasks",
         "megadsl_next_line", "--include_path", str(tasks), "--device", "cpu", "--batch_size", "4", "--output_path", str(tmp_path / "results")],
        capture_output=True, text=True, cwd=tasks, env=offline, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(next((tmp_path / "results").rglob("results*.json")).read_text(encoding="utf-8"))
    assert found["n-samples"]["megadsl_next_line"]["effective"] == 12
    assert 0.0 <= found["results"]["megadsl_next_line"]["acc,none"] <= 1.0
