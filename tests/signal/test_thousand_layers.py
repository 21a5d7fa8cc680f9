"""A thousand layers train, by the command's own path with recomputation: one step, of which every quarter of the depth alone has
learnt. Any loss falls when a head learns which tokens are frequent, so what is measured is what the layers' own updates do: the
loss at the start weights with only this quarter's weights from after the step. `vanilla` and Xavier's Post-LN fail the same check.
"""

import re
from pathlib import Path

import pytest
import torch
from losses import mean_loss

from megadsl.config import load_config

CONFIG = Path(__file__).parents[2] / "configs" / "decoder-1000.yaml"
LAYERS, QUARTERS = 1000, 4
LEAST_GAIN = 0.1  # nats; seen: dslm .26 to .29, vanilla .04 to .07 by the seed, Xavier's Post-LN 0 in the first quarter


def configured(small_data, run_dir: Path, *overrides: str):
    return load_config(CONFIG, [
        "model.hidden_size=16", "model.num_attention_heads=2", "model.seq_length=16", f"tokenizer.model={small_data.tokenizer}",
        f"data.datasets=[{small_data.dataset}]", f"training.run_dir={run_dir}", "training.micro_batch_size=4",
        "training.train_iters=1", "training.eval_iters=0", "optimizer.lr=1e-3", "optimizer.min_lr=1e-3", "optimizer.lr_warmup_iters=0",
        "optimizer.clip_grad=0", "data.num_workers=0", *overrides,
    ])


def first_batch(config) -> dict[str, torch.Tensor]:
    """What the model is called with in the first step."""
    from megadsl.data.sampler import MicroBatches
    from megadsl.tasks.registry import task_of

    return next(MicroBatches(task_of(config).splits(4).train, consumed_samples=0, micro_batch_size=4, global_batch_size=4))


@torch.no_grad()
def gains(stack, batch: dict[str, torch.Tensor], trained: dict[str, torch.Tensor]) -> list[float]:
    """By how much each quarter's `trained` weights alone lower the loss of the weights that `stack` has."""
    start = {name: parameter.clone() for name, parameter in stack.canonical_parameters()}
    before, found = float(mean_loss(stack, batch)), []
    for quarter in range(QUARTERS):
        for name, parameter in stack.canonical_parameters():
            layer = re.match(r"decoder\.(\d+)\.", name)
            inside = layer and int(layer[1]) * QUARTERS // LAYERS == quarter
            parameter.copy_(trained[name] if inside else start[name])
        found.append(before - float(mean_loss(stack, batch)))
    return found


def _train(config) -> list[float]:
    import json

    from megadsl.training.loop import train

    train(config)
    rows = (Path(config.training.run_dir) / "metrics.jsonl").read_text().splitlines()
    return [row["train/loss"] for row in map(json.loads, rows) if "train/loss" in row]


def test_a_thousand_layers_train(make_stack, small_data, tmp_path):
    from ranks import run_ranks

    from megadsl.checkpoint.weights import read_weights

    config = configured(small_data, tmp_path)
    [[loss]] = run_ranks(1, _train, config)
    [checkpoint] = (tmp_path / "checkpoints").glob("iteration-*")
    stack, _ = make_stack(config)
    batch = first_batch(config)
    with torch.no_grad():
        assert loss == pytest.approx(float(mean_loss(stack, batch)), rel=1e-5), "not the weights or the batch that the run began with"
    learnt = gains(stack, batch, dict(read_weights(checkpoint)))
    assert min(learnt) > LEAST_GAIN, learnt


@pytest.mark.parametrize("overrides", [["scheme=vanilla"], ["scheme=xavier", "model.norm_position=post"]], ids=["vanilla", "xavier post"])
def test_other_schemes_fail_the_same_check(make_stack, small_data, tmp_path, overrides):
    config = configured(small_data, tmp_path, *overrides)
    stack, _ = make_stack(config)
    batch = first_batch(config)
    start = {name: parameter.detach().clone() for name, parameter in stack.canonical_parameters()}
    optimizer = torch.optim.AdamW(stack.parameters(), lr=1e-3, weight_decay=0.0)
    mean_loss(stack, batch).backward()
    optimizer.step()
    trained = {name: parameter.detach().clone() for name, parameter in stack.canonical_parameters()}
    with torch.no_grad():
        for name, parameter in stack.canonical_parameters():
            parameter.copy_(start[name])
    assert min(gains(stack, batch, trained)) < LEAST_GAIN
