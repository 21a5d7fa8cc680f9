"""A resume fills every number from the checkpoint, and together the ranks read each of its numbers once. Real processes."""

import contextlib
import io
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from ranks import ForkServer, free_port

from megadsl.checkpoint.store import CheckpointStore
from megadsl.checkpoint.weights import KINDS, TensorReader
from megadsl.config import Config

# (tensor, pipeline, data, ZeRO)
LAYOUTS = [(1, 1, 1, 0), (1, 1, 2, 0), (2, 1, 2, 0), (2, 1, 2, 1), (2, 1, 2, 2), (2, 1, 2, 3), (1, 2, 2, 1), (2, 2, 1, 1)]


@pytest.fixture(scope="module")
def server():
    with ForkServer() as started:
        yield started


def configured(small_data, run_dir: Path, layout, precision: str = "fp32") -> Config:
    tensor, pipeline, _, zero = layout
    return small_data.config(
        run_dir, model={"num_layers": 4, "hidden_size": 32, "num_attention_heads": 4, "num_query_groups": 2, "activation": "swiglu"},
        parallel={"tensor_model_parallel_size": tensor, "pipeline_model_parallel_size": pipeline, "zero_stage": zero},
        training={"train_iters": 3, "eval_iters": 0, "precision": precision},
    )


def _train(config: Config) -> None:
    from megadsl.training.loop import train

    with contextlib.redirect_stdout(io.StringIO()):
        train(config)


@pytest.fixture(scope="module")
def trained(server, small_data, tmp_path_factory) -> Path:
    """A run of three steps on one process; its embedding is tied to its head."""
    folder = tmp_path_factory.mktemp("trained")
    server.run(1, _train, configured(small_data, folder, (1, 1, 1, 1)))
    return folder


def _resume(config: Config, port: int, trained: Path) -> dict:
    """What one rank holds before and after loading, and what it read."""
    os.environ["MASTER_PORT"] = str(port)
    from megadsl.parallel.device import prepare_device
    from megadsl.parallel.groups import destroy_groups, initialize_groups
    from megadsl.training.engine import Engine
    from megadsl.training.preflight import preflight

    ready, checkpoint = preflight(config), CheckpointStore(trained / "checkpoints").latest()
    device = prepare_device("cpu")
    initialize_groups(ready.launch, ready.topology, device)
    coordinate = ready.topology.coordinate(ready.launch.rank)
    engine = Engine(config, ready.task, checkpoint.plan(), ready.topology, coordinate, device,
                    filled=checkpoint.manifest.tensor_files("weights"))
    before = [bool(tensor.isnan().all()) for _, _, tensor in engine.state.tensors(("weights",))]
    with TensorReader(checkpoint.path, checkpoint.manifest) as reader:
        engine.state.load(reader, checkpoint.info.optimizer_steps, {})
        read = reader.bytes_read
    used = {}
    for name, parameter in engine.model.canonical_parameters():
        if config.parallel.zero_stage == 3:  # partitioned; its parts are in `state`, and gathered here for the forward pass
            import deepspeed

            with deepspeed.zero.GatheredParameters(parameter):
                used[name] = parameter.dtype, parameter.detach().float().clone().numpy()
        else:
            used[name] = parameter.dtype, parameter.detach().float().clone().numpy()
    state = {(kind, name): tensor.clone().numpy() for kind, name, tensor in engine.state.tensors()}
    tags = {name: parameter.megadsl_tag for name, parameter in engine.model.canonical_parameters()}
    destroy_groups()
    return {"before": before, "read": read, "used": used, "state": state, "tags": tags, "tensor": coordinate.tensor}


def full_state(trained: Path) -> dict[tuple[str, str], np.ndarray]:
    checkpoint = CheckpointStore(trained / "checkpoints").latest()
    with TensorReader(checkpoint.path, checkpoint.manifest) as reader:
        return {(kind, name): reader.tensor(kind, name).clone().numpy() for kind in KINDS for name in reader.names(kind)}


def check_values(found: list[dict], saved: dict, size: int) -> None:
    """Nothing was there before (all NaN); afterwards everything is, bit for bit; what the model computes with is rounded to its type."""
    assert all(all(rank["before"]) for rank in found) and any(rank["before"] for rank in found)
    state = {key: value for rank in found for key, value in rank["state"].items()}
    assert state.keys() == saved.keys() and all(np.array_equal(state[key], saved[key]) for key in saved)
    for rank in found:
        for name, (dtype, value) in rank["used"].items():
            shard = rank["tags"][name].shard(torch.from_numpy(saved["weights", name]), rank["tensor"], size)
            assert torch.equal(torch.from_numpy(value), shard.to(dtype).float()), name


def needed_bytes(found: list[dict], layout) -> int:
    """Every number once for each place that cannot get it from a data rank: stages and, if it is replicated, tensor ranks."""
    tensor, pipeline, data, _ = layout
    places = [found[(stage * data) * tensor + rank] for stage in range(pipeline) for rank in range(tensor)]
    return 3 * sum(value.size * 4 for place in places for _, value in place["used"].values())


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_number_is_filled_and_read_once(server, small_data, tmp_path, trained, layout):
    tensor, pipeline, data, zero = layout
    found = server.run(tensor * pipeline * data, _resume, configured(small_data, tmp_path, layout), free_port(), trained)
    check_values(found, full_state(trained), tensor)
    read, needed = [rank["read"] for rank in found], needed_bytes(found, layout)
    if zero == 0 or data == 1:
        assert sum(read) == needed
    else:
        assert needed <= sum(read) < 1.1 * needed, "a range reads its first and last row whole"
    # Shares are whole parameters at ZeRO 0; the largest, the embedding, is a fifth of this model.
    assert max(read) < 1.35 * needed / len(read)


@pytest.mark.parametrize("layout", [(1, 1, 2, 1), (1, 1, 2, 2), (1, 1, 2, 3), (1, 2, 2, 1)], ids=str)
def test_sixteen_bit_weights_are_the_rounded_ones(server, small_data, tmp_path, trained, layout):
    config = configured(small_data, tmp_path, layout, "bf16")
    found = server.run(layout[0] * layout[1] * layout[2], _resume, config, free_port(), trained)
    assert any(dtype == torch.bfloat16 for dtype, _ in found[0]["used"].values())
    check_values(found, full_state(trained), layout[0])
