"""Recomputation changes no number, also with dropout on and under every kind of layout: masks are drawn again, rank by rank.

A first loss would agree anyway; gradients that come from other masks show in the norms and in the losses after it.
"""

import json
from pathlib import Path

import pytest
from ranks import ForkServer

from megadsl.config import Config

STEPS, LAYERS, MICRO_BATCHES = 3, 2, 2
ENCODER_DECODER = {"family": "encoder_decoder", "decoder_seq_length": 9}  # LAYERS in each stack
# Other masks the second time would come where a generator is used: tensor-parallel ranks have one of their own for attention,
# stages have one each, ZeRO 3 gathers parameters again. name: (processes, layers x micro-batches of a rank, parallel and model section)
LAYOUTS = {
    "alone": (1, 4, {}, {}),
    "TP 2": (2, 4, {"tensor_model_parallel_size": 2}, {}),
    "PP 2": (2, 2, {"pipeline_model_parallel_size": 2}, {}),
    "ZeRO 3": (2, 2, {"zero_stage": 3}, {}),
    "encoder-decoder, TP 2": (2, 8, {"tensor_model_parallel_size": 2}, ENCODER_DECODER),
    "encoder-decoder, PP 2": (2, 4, {"pipeline_model_parallel_size": 2}, ENCODER_DECODER),
}


@pytest.fixture(scope="module")
def server():
    with ForkServer() as started:
        yield started


def configured(small_data, run_dir: Path, recompute: bool, dropout: float, parallel: dict, model: dict) -> Config:
    return small_data.config(
        run_dir, parallel=parallel, model={"num_layers": LAYERS, "hidden_dropout": dropout, "attention_dropout": dropout, **model},
        training={"train_iters": STEPS, "eval_iters": 0, "recompute": recompute, "global_batch_size": 2 * MICRO_BATCHES},
        monitor={"log_interval": STEPS},
    )


def _train(config: Config) -> int:
    """How often this rank put a layer under recomputation."""
    import megadsl.model.layer as layer
    from megadsl.training.loop import train

    real, calls = layer.tensor_parallel.checkpoint, []
    layer.tensor_parallel.checkpoint = lambda *arguments: calls.append(1) or real(*arguments)
    train(config)
    return len(calls)


def _curve(run_dir: Path) -> list[float]:
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [row[key] for row in rows if "train/loss" in row for key in ("train/loss", "train/grad_norm")]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_recomputation_draws_the_same_masks_again(server, small_data, tmp_path, layout):
    world, forwards, parallel, model = LAYOUTS[layout]
    curves = {}
    for recompute in (False, True):
        config = configured(small_data, tmp_path / str(recompute), recompute, 0.2, parallel, model)
        calls = server.run(world, _train, config)
        assert calls == [recompute * STEPS * forwards] * world
        curves[recompute] = _curve(tmp_path / str(recompute))
    assert len(curves[False]) == 2 * STEPS
    assert curves[True] == pytest.approx(curves[False], rel=1e-6)


def test_the_masks_matter(server, small_data, tmp_path):
    for dropout in (0.0, 0.2):
        server.run(1, _train, configured(small_data, tmp_path / str(dropout), True, dropout, {}, {}))
    assert _curve(tmp_path / "0.0")[1] != pytest.approx(_curve(tmp_path / "0.2")[1], rel=1e-3)
