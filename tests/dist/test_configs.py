"""Every file of configs/ trains, at a size that a test can afford: finite, falling loss, validation, a checkpoint that evaluates."""

import json
import math
from pathlib import Path

import pytest
from ranks import ForkServer

from megadsl.config import load_config
from megadsl.tasks.registry import task_of

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
SMALL = ["model.hidden_size=32", "model.num_attention_heads=4", "model.seq_length=32", "training.train_iters=30",
         "training.eval_interval=0", "training.eval_iters=2", "checkpoint.save_interval=0", "optimizer.lr_warmup_iters=5",
         "training.global_batch_size=8", "training.micro_batch_size=4", "data.num_workers=0", "monitor.tensorboard=false",
         "optimizer.lr=5.0e-3", "optimizer.min_lr=5.0e-4"]


@pytest.fixture(scope="module")
def server():
    with ForkServer() as running:
        yield running


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_config_trains(file, small_data, tmp_path, server):
    overrides = [
        *SMALL, f"tokenizer.model={small_data.tokenizer}", f"data.datasets=[{small_data.dataset}]", f"training.run_dir={tmp_path}",
    ]
    full = load_config(file)
    overrides.append(f"model.num_layers={max(4, full.model.num_layers // 16)}")
    if full.model.family == "encoder_decoder":
        targets = 32 if task_of(full).options.corruption == "infilling" else 9
        overrides += ["model.num_decoder_layers=6", f"model.decoder_seq_length={targets}"]
    [result] = server.run(1, _train_and_evaluate, load_config(file, overrides))
    losses = [row["train/loss"] for row in map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines()) if "train/loss" in row]
    assert len(losses) == 30 and all(map(math.isfinite, losses))
    assert sum(losses[-5:]) / 5 < sum(losses[:3]) / 3 - 0.4, losses
    assert math.isfinite(result)


def _train_and_evaluate(config) -> float:
    """Train, then the loss of the run's checkpoint by `megadsl evaluate`."""
    import contextlib
    import io

    from megadsl.cli.evaluate import evaluate
    from megadsl.training.loop import train

    train(config)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        evaluate(config.training.run_dir, data=config.data.datasets[0].path, split="validation", batch_tokens=512,
                 max_tokens=2000, pseudo_tokens=8 if config.model.family == "encoder" else None, tensor_parallel=1, device="cpu",
                 output=None, as_json=True)
    found = json.loads(printed.getvalue())
    return found["masked_loss"] if config.model.family == "encoder" else found["loss"]
