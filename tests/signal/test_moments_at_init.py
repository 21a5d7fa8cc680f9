"""The claim of configs/decoder-192.yaml: measured forward variance within 10 % of the plan at every sublayer, at unit
variance; `vanilla` fails the test of unit variance. And a thousand layers train.
"""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from megadsl.config import load_config

CONFIGS = Path(__file__).parents[2] / "configs"


SEEDS = range(6)


def measure(make_stack, small_data, scheme: str):
    """(measured forward variance [seed, sublayer], plan) of the demo's shape on 16 sequences of real text."""
    from megadsl.data.dataset import check_datasets
    from megadsl.data.objective import open_datasets
    from megadsl.data.sampler import MicroBatches
    from megadsl.model.init import initialize
    from megadsl.monitor.probes import StreamProbes

    config = load_config(CONFIGS / "decoder-192.yaml", [
        f"scheme={scheme}", f"tokenizer.model={small_data.tokenizer}", f"data.datasets=[{small_data.dataset}]",
    ])
    tokenizer = check_datasets(config)
    stack, plan = make_stack(config, config.tokenizer.padded_vocab_size(tokenizer.vocab_size))
    datasets = open_datasets(config, tokenizer.sha256)
    tokens = next(MicroBatches(datasets.train, consumed_samples=0, micro_batch_size=16, global_batch_size=16))["tokens"]
    variances = []
    for seed in SEEDS:
        initialize(stack.canonical_parameters(), seed, 0, 1)
        with StreamProbes(stack) as probes, torch.no_grad():
            stack(tokens)
        variances.append(probes.read().forward_variance)
    return np.array(variances), plan


def has_unit_variance(variance: np.ndarray) -> bool:
    return bool((np.abs(variance - 1) <= 0.1).all())


def test_dslm_has_unit_variance_as_planned_and_vanilla_has_not(make_stack, small_data):
    """The plan is an average over weights. At width 64 one draw of them scatters: the tokens share a direction, and what a
    random matrix does to it has a relative deviation of 1/8 per sublayer, which adds up to 7 % over depth.
    """
    variances, plan = measure(make_stack, small_data, "dslm")
    planned = np.array([sublayer.forward_variance for sublayer in plan.sublayers])
    assert variances.shape == (len(SEEDS), 2 * 192)
    mean, scatter = variances.mean(axis=0), variances.std(axis=0, ddof=1)
    assert np.abs(mean / planned - 1).max() <= 0.1, (mean.min(), mean.max())
    assert scatter.max() / len(SEEDS) ** 0.5 < 0.06, "the mean must be known well enough to mean something"
    assert has_unit_variance(mean)
    vanilla, _ = measure(make_stack, small_data, "vanilla")
    assert not has_unit_variance(vanilla.mean(axis=0))


def test_a_thousand_layers_train(small_data, tmp_path):
    """decoder-1000.yaml at a size that a test can afford: recomputation on, loss finite and falling."""
    from ranks import run_ranks

    config = load_config(CONFIGS / "decoder-1000.yaml", [
        "model.hidden_size=16", "model.num_attention_heads=2", "model.seq_length=16", f"tokenizer.model={small_data.tokenizer}",
        f"data.datasets=[{small_data.dataset}]", f"training.run_dir={tmp_path}", "training.micro_batch_size=4",
        "training.train_iters=5", "training.eval_iters=0", "optimizer.lr_warmup_iters=0", "optimizer.lr=0.01", "data.num_workers=0",
    ])
    losses = run_ranks(1, _losses, config)[0]
    # The mean of three batches, because their losses scatter by .2.
    assert len(losses) == 5 and all(map(math.isfinite, losses)) and sum(losses[-3:]) / 3 < losses[0] - 0.3, losses


def _losses(config) -> list[float]:
    import json

    from megadsl.training.loop import train

    train(config)
    rows = (Path(config.training.run_dir) / "metrics.jsonl").read_text().splitlines()
    return [row["train/loss"] for row in map(json.loads, rows) if "train/loss" in row]
