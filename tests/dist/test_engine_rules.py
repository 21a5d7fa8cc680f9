"""Rules of the engine on real processes: equal initial weights, dropout masks, non-finite steps, untouched by the layout."""

import math
import os
from pathlib import Path

import pytest
import torch
from ranks import free_port, run_ranks

from megadsl.config import Config
from megadsl.errors import UserError


def _make_engine(config: Config):
    from megadsl.parallel.device import prepare_device
    from megadsl.parallel.groups import initialize_groups
    from megadsl.training.engine import Engine
    from megadsl.training.preflight import preflight

    os.environ.setdefault("MASTER_PORT", "29511")
    ready = preflight(config)
    device = prepare_device("cpu")
    initialize_groups(ready.launch, ready.topology, device)
    return Engine(config, ready.task, ready.plan, ready.topology, ready.topology.coordinate(ready.launch.rank), device)


def _on_each(function, configs: list[Config], ports: list[int]) -> list:
    """function(config, port) for one config after the other: one start of the processes serves them all."""
    return [function(config, port) for config, port in zip(configs, ports, strict=True)]


def run_each(world_size: int, function, configs: list[Config]) -> list[list]:
    """Results by rank, each a list by config."""
    return run_ranks(world_size, _on_each, function, configs, [free_port() for _ in configs])


def _full_parameters(config: Config, port: int) -> dict[str, torch.Tensor]:
    os.environ["MASTER_PORT"] = str(port)
    from megadsl.parallel.groups import destroy_groups

    found = {name: tensor.numpy() for name, tensor in _make_engine(config).full_parameters()}
    destroy_groups()
    return found


def test_every_layout_starts_from_the_same_weights(small_data, tmp_path):
    model = {"activation": "swiglu", "num_query_groups": 2, "num_layers": 3}
    layouts = [{"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}]
    [[alone]] = run_each(1, _full_parameters, [small_data.config(tmp_path, model=model)])
    first, second = run_each(2, _full_parameters, [small_data.config(tmp_path, model=model, parallel=layout) for layout in layouts])
    for layout, mine, others in zip(layouts, first, second, strict=True):
        assert not mine.keys() & others.keys(), "a parameter belongs to one writer"
        shared = mine | others
        assert shared.keys() == alone.keys()
        for name, value in alone.items():
            assert (shared[name] == value).all(), (layout, name)


def _masks(config: Config, port: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(what hidden dropout kept, what attention dropout kept) on this rank."""
    os.environ["MASTER_PORT"] = str(port)
    from megadsl.model.core_attention import ScaledDotProductAttention
    from megadsl.model.layer import transformer_config
    from megadsl.model.residual import ResidualConnection
    from megadsl.parallel.device import prepare_device
    from megadsl.parallel.groups import destroy_groups, initialize_groups
    from megadsl.parallel.rng import seed_micro_batch
    from megadsl.training.preflight import preflight

    ready = preflight(config)
    initialize_groups(ready.launch, ready.topology, prepare_device("cpu"))
    seed_micro_batch(1, 5, 0)
    core = ScaledDotProductAttention(transformer_config(config.model, 2), 1, None, "self").train()
    heads = torch.zeros(64, 2, 2, 8)
    # Uniform probabilities over values of 1: the output shows which probabilities were kept.
    attention = core(heads, heads, torch.ones(64, 2, 2, 8), None)
    hidden = ResidualConnection(0.8, 0.6)(True, False)((torch.ones(64, 2, 32), None), torch.zeros(64, 2, 32), 0.5)
    destroy_groups()
    return hidden.numpy(), attention.numpy()


def test_masks_are_equal_where_activations_are_replicated_and_differ_where_they_are_sharded(small_data, tmp_path):
    config = small_data.config(tmp_path, model={"hidden_dropout": 0.5, "attention_dropout": 0.5},
                               parallel={"tensor_model_parallel_size": 2})
    (hidden_0, attention_0), (hidden_1, attention_1) = run_ranks(2, _masks, config, free_port())
    assert (hidden_0 == hidden_1).all() and 0.4 < (hidden_0 == 0).mean() < 0.6
    assert (attention_0 != attention_1).mean() > 0.5


def _losses_with_dropout(config: Config, port: int) -> list[float]:
    os.environ["MASTER_PORT"] = str(port)
    from megadsl.data.sampler import MicroBatches
    from megadsl.parallel.groups import destroy_groups

    engine = _make_engine(config)
    training = config.training
    batches = MicroBatches(
        engine.task.splits(training.train_iters * training.global_batch_size).train, consumed_samples=0,
        micro_batch_size=training.micro_batch_size, global_batch_size=training.global_batch_size,
        data_parallel_rank=engine.coordinate.data, data_parallel_size=engine.topology.data,
    )
    losses = [engine.train_step(batches, iteration, 3e-3).loss for iteration in range(4)]
    destroy_groups()
    return losses


def test_dropout_masks_belong_to_the_micro_batch_not_to_the_rank(small_data, tmp_path):
    """Data parallelism and recomputation change nothing even with dropout on; another seed does."""
    dropout = {"hidden_dropout": 0.2, "attention_dropout": 0.2}
    variants = [{}, {"recompute": True}, {"seed": 9}]
    configs = [small_data.config(tmp_path, model=dropout, training=variant) for variant in variants]
    [[alone, recomputed, other]] = run_each(1, _losses_with_dropout, configs)
    two = [losses for [losses] in run_each(2, _losses_with_dropout, configs[:1])]
    assert two[0] == two[1] == pytest.approx(alone, rel=1e-5)
    assert recomputed == pytest.approx(alone, rel=1e-6)
    assert other != pytest.approx(alone, rel=1e-3)


def _poisoned(config: Config, port: int) -> tuple:
    os.environ["MASTER_PORT"] = str(port)
    from megadsl.parallel.groups import destroy_groups

    engine = _make_engine(config)

    def batches(poison: float):
        tokens = torch.arange(2 * 33).reshape(2, 33) % 500
        while True:
            mask = torch.ones(2, 32)
            mask[0, 0] = poison
            yield {"tokens": tokens[:, :-1].contiguous(), "labels": tokens[:, 1:].contiguous(), "loss_mask": mask}

    def weights():
        # Masters and weights agree in fp32, and all ranks hold what they train.
        return {name: parameter.detach().clone() for name, parameter in engine.model.canonical_parameters()}

    stage_3 = config.parallel.zero_stage == 3
    first = engine.train_step(batches(1.0), 0, 1e-2)
    before = dict(engine.full_parameters()) if stage_3 else weights()
    bad = engine.train_step(batches(math.nan), 1, 1e-2)
    after = dict(engine.full_parameters()) if stage_3 else weights()
    unchanged = all(torch.equal(before[name], after[name]) for name in before)
    good = engine.train_step(batches(1.0), 2, 1e-2)
    last = dict(engine.full_parameters()) if stage_3 else weights()
    moved = all(not torch.equal(after[name], last[name]) for name in after if name.endswith("linear_fc1.weight"))
    destroy_groups()
    return first.skipped, bad.skipped, unchanged, good.skipped, good.loss < first.loss, moved


def test_a_step_that_is_not_finite_changes_nothing(small_data, tmp_path):
    layouts = [{"zero_stage": stage} for stage in range(4)] + [
        {"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2},
    ]
    configs = [small_data.config(tmp_path, parallel=layout) for layout in layouts]
    for results in run_each(2, _poisoned, configs):
        for layout, result in zip(layouts, results, strict=True):
            assert result == (False, True, True, False, True, True), layout


def _train(config: Config, port: int) -> str:
    os.environ["MASTER_PORT"] = str(port)
    from megadsl.training.loop import train

    try:
        train(config)
    except UserError as error:
        return str(error)
    return "no error"


def test_too_many_such_steps_stop_the_run_and_name_the_last_good_checkpoint(small_data, tmp_path):
    config = small_data.config(
        tmp_path, optimizer={"lr": 1e30, "clip_grad": 0.0, "lr_warmup_iters": 0},
        training={"max_skipped_iterations": 3, "train_iters": 50}, checkpoint={"save_interval": 1, "keep_last": 3},
    )
    [message] = run_ranks(1, _train, config, free_port())
    saved = [path.name for path in (Path(config.training.run_dir) / "checkpoints").glob("iteration-*")]
    assert saved == ["iteration-0000001"], "a model that has just failed is not saved"
    assert "3 iterations in a row were not finite, the last one 4" in message, message
    assert f"the last good checkpoint is {Path(config.training.run_dir) / 'checkpoints' / saved[0]}" in message, message
