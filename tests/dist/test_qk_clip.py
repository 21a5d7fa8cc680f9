"""QK-clip bounds attention scores that have grown, and does the same under every layout.

The same batch is seen in every step: one real step, so that biases are not 0, then query and key weights are scaled up, then steps
of learning rate 0, in which QK-clip alone changes weights.
"""

import json
from dataclasses import dataclass

import pytest
import torch
from ranks import ForkServer

from megadsl.config import Config
from megadsl.errors import UserError

THRESHOLD, GROWTH = 6.0, 5.0
# (tensor, pipeline, data, ZeRO)
REFERENCE = (1, 1, 1, 0)
LAYOUTS = [(2, 1, 1, 1), (1, 2, 1, 1), (1, 1, 2, 0), (1, 1, 2, 1), (1, 1, 2, 2), (1, 1, 2, 3)]
MODELS = {
    "decoder": (LAYOUTS, {"num_query_groups": 2, "position_embedding_type": "rope"}),
    "encoder_decoder": ([(2, 1, 1, 1), (1, 1, 2, 3)], {"family": "encoder_decoder", "attention_logit_softcap": 4.0}),
}


@dataclass
class Outcome:
    """What a rank saw by step: the loss, the largest score of all ranks, the largest of every head of its first layer."""

    losses: list[float]
    largest: list[float]
    first_layer: list[torch.Tensor]


def _batches(config: Config) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    batch, micro = config.training.global_batch_size, config.training.micro_batch_size
    tokens = torch.randint(5, 500, (batch, 32), generator=generator)
    whole = {"tokens": tokens, "source_tokens": tokens, "target_tokens": tokens, "labels": tokens, "loss_mask": torch.ones(batch, 32),
             "target_spans": torch.zeros_like(tokens)}
    return [{name: tensor[start:start + micro] for name, tensor in whole.items()} for start in range(0, batch, micro)]


def _steps(config: Config) -> Outcome:
    from megadsl.model.init import tag_of
    from megadsl.parallel.device import prepare_device
    from megadsl.parallel.groups import destroy_groups, initialize_groups
    from megadsl.training.engine import Engine
    from megadsl.training.preflight import preflight

    ready, device = preflight(config), prepare_device("cpu")
    initialize_groups(ready.launch, ready.topology, device)
    coordinate = ready.topology.coordinate(ready.launch.rank)
    engine = Engine(config, ready.task, ready.plan, ready.topology, coordinate, device)
    attentions, seen = engine._qk_clip._attentions, []
    after_step = engine._qk_clip.after_step
    engine._qk_clip.after_step = lambda clip: seen.append(attentions[0].core_attention.largest_scores.clone()) or after_step(clip)
    mine = _batches(config)[coordinate.data::ready.topology.data]
    results = [engine.train_step(iter(mine), 0, 1e-2)]
    engine.state.scale_rows({
        parameter: torch.full(tag_of(name, parameter).shard_shape(ready.topology.tensor)[:1], GROWTH)
        for attention in attentions for name, parameter in attention.named_parameters() if name.startswith("linear_q")
    })
    results += [engine.train_step(iter(mine), step, 0.0) for step in range(1, 5)]
    destroy_groups()
    return Outcome([result.loss for result in results], [result.largest_score for result in results], seen)


def configured(small_data, run_dir, layout: tuple[int, int, int, int], model: dict, threshold: float = THRESHOLD, **training) -> Config:
    tensor, pipeline, _, zero = layout
    return small_data.config(
        run_dir, model={"num_layers": 2, **model}, training={"micro_batch_size": 2, "global_batch_size": 8, **training},
        optimizer={"qk_clip": True, "qk_clip_threshold": threshold},
        parallel={"tensor_model_parallel_size": tensor, "pipeline_model_parallel_size": pipeline, "zero_stage": zero},
    )


@pytest.fixture(scope="module")
def server():
    with ForkServer() as started:
        yield started


@pytest.mark.parametrize("name", MODELS)
def test_scores_are_bounded_alike_in_every_layout(server, small_data, tmp_path, name):
    layouts, model = MODELS[name]

    def outcomes(layout: tuple[int, int, int, int], threshold: float = THRESHOLD) -> list[Outcome]:
        world = layout[0] * layout[1] * layout[2]
        return server.run(world, _steps, configured(small_data, tmp_path, layout, model, threshold))

    [free], [alone] = outcomes(REFERENCE, 1e9), outcomes(REFERENCE)
    # Without it scores stay where the scaled weights took them; nothing else changes a weight.
    assert free.largest[1:] == pytest.approx([free.largest[1]] * 4) and free.largest[1] > 3.0 * THRESHOLD
    assert alone.largest[1] == pytest.approx(free.largest[1], rel=1e-5), "the step in which they are seen comes before"
    # The first layer's input stays as it is, so its scores are exactly at the threshold; heads of one key head go together.
    before, after = (alone.first_layer[step].view(-1, 2 if name == "decoder" else 1).amax(dim=1) for step in (1, 2))
    assert (before > THRESHOLD).any()
    torch.testing.assert_close(after, before.clamp(max=THRESHOLD), rtol=1e-4, atol=1e-4)
    # Deeper ones follow, whose input the clipping above them changed.
    assert alone.largest[2] < 1.5 * THRESHOLD and alone.largest[4] <= THRESHOLD * 1.001
    assert abs(alone.losses[4] - free.losses[4]) > 1e-3
    for layout in layouts:
        for found in outcomes(layout):
            assert found.largest == pytest.approx(alone.largest, rel=1e-4), layout
            assert found.losses == pytest.approx(alone.losses, rel=1e-5), layout


def test_master_weights_are_what_is_scaled(server, small_data, tmp_path):
    """bf16: two ranks hold half of the fp32 weights each."""
    config = configured(small_data, tmp_path, (1, 1, 2, 1), {}, precision="bf16")
    for found in server.run(2, _steps, config):
        assert found.largest[1] > 3.0 * THRESHOLD and found.largest[4] <= THRESHOLD * 1.02


def _train(config: Config) -> None:
    from megadsl.training.loop import train

    train(config)


def test_a_run_writes_the_largest_score(server, small_data, tmp_path):
    config = configured(small_data, tmp_path / "run", REFERENCE, {}, train_iters=3, eval_iters=0)
    server.run(1, _train, config)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(0.0 < row["train/max_attention_logit"] < 100.0 for row in rows if "train/loss" in row)


def test_it_does_not_go_with_qk_norm(small_data, tmp_path):
    with pytest.raises(UserError, match=r"optimizer\.qk_clip .*model\.qk_layernorm"):
        configured(small_data, tmp_path, REFERENCE, {"qk_layernorm": True})
