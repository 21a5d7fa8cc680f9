"""The signal that a run measures of itself is the same in every layout, with recomputation and accumulation, and costs no bit of the loss."""

import json
from pathlib import Path

import numpy as np
import pytest
from ranks import ForkServer

from megadsl.config import Config
from megadsl.monitor.signal import PARAMETER_QUANTITIES, QUANTITIES, SignalHistory

# (tensor, pipeline, data, ZeRO, recompute)
REFERENCE = (1, 1, 1, 0, False)
LAYOUTS = [(2, 1, 1, 1, False), (1, 2, 1, 1, False), (1, 1, 2, 0, False), (1, 1, 2, 2, False), (1, 1, 2, 3, True), (1, 2, 1, 1, True), (2, 2, 1, 1, False)]
MODELS = {
    "decoder": ({"num_layers": 4}, {}, LAYOUTS),
    "BART": ({"family": "encoder_decoder", "num_layers": 3, "num_decoder_layers": 2, "norm_position": "post", "embedding_layernorm": True},
             {"corruption": "infilling"}, LAYOUTS[:2]),
}


def train(config: Config) -> None:
    from megadsl.training.loop import train as run

    run(config)


@pytest.fixture(scope="module")
def runs(small_data, tmp_path_factory) -> dict:
    folder, found = tmp_path_factory.mktemp("signal"), {}
    with ForkServer() as server:
        for name, (model, task, layouts) in MODELS.items():
            for layout in (REFERENCE, *layouts, "off"):
                tensor, pipeline, data, zero, recompute = REFERENCE if layout == "off" else layout
                config = small_data.config(
                    folder / name / str(layout), model=model, task=task,
                    parallel={"tensor_model_parallel_size": tensor, "pipeline_model_parallel_size": pipeline, "zero_stage": zero},
                    training={"train_iters": 4, "eval_iters": 0, "recompute": recompute},
                    monitor={"signal_interval": 0 if layout == "off" else 1, "log_interval": 2})
                server.run(tensor * pipeline * data, train, config)
                found[name, layout] = Path(config.training.run_dir)
    return found


def losses(run_dir: Path) -> list[float]:
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [row["train/loss"] for row in rows if "train/loss" in row]


@pytest.mark.parametrize("name", MODELS)
def test_every_layout_measures_the_same(runs, name):
    reference = SignalHistory.read(runs[name, REFERENCE] / "signal.jsonl")
    assert reference.iterations == [0, 1, 3], "the first step alone, then one record a log line"
    first = reference.records[0]
    for quantity in QUANTITIES:
        assert np.isfinite(first.values[quantity]).any(), quantity
    for layout in MODELS[name][2]:
        other = SignalHistory.read(runs[name, layout] / "signal.jsonl")
        assert other.points == reference.points and other.iterations == reference.iterations
        for quantity in QUANTITIES:
            np.testing.assert_allclose(other.records[0].values[quantity], first.values[quantity], rtol=1e-4, atol=1e-6, err_msg=f"{layout} {quantity}")
        for quantity in PARAMETER_QUANTITIES:
            ours = first.parameters[quantity]
            assert other.records[0].parameters[quantity] == pytest.approx(ours, rel=1e-4), (layout, quantity)
            assert len(ours) > 10


@pytest.mark.parametrize("name", MODELS)
def test_measuring_changes_no_bit_of_the_loss(runs, name):
    assert losses(runs[name, "off"]) == losses(runs[name, REFERENCE])
    assert not (runs[name, "off"] / "signal.jsonl").read_text().count("values")
