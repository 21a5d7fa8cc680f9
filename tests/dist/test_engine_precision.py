"""A 16-bit run is evaluated with the numbers it was trained with."""

import pytest
import torch
from ranks import ForkServer

FAMILIES = {
    "decoder": {"position_embedding_type": "relative"},
    "encoder": {"family": "encoder", "norm_position": "post", "embedding_layernorm": True},
    "encoder_decoder": {"family": "encoder_decoder", "position_embedding_type": "relative"},
}


def _tokens(definition) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {name: torch.randint(1, 2 if "segments" in name else 500, (2, 16), generator=generator)
            for name in definition.inputs}


def _train_and_load(config) -> tuple[torch.Tensor, torch.Tensor, set]:
    """Logits of the training engine's model after its last step, of its checkpoint as evaluation loads it, and all dtypes."""
    from megadsl.checkpoint.store import open_checkpoint
    from megadsl.parallel.device import prepare_device
    from megadsl.parallel.groups import destroy_groups, initialize_groups
    from megadsl.tasks.trained import load_trained
    from megadsl.training.loop import Run
    from megadsl.training.preflight import preflight
    from megadsl.training.signals import Stop

    ready, device = preflight(config), prepare_device("cpu")
    initialize_groups(ready.launch, ready.topology, device)
    run = Run(config, ready, device, Stop())
    run.run()
    trained, inputs = run.engine.model.eval(), _tokens(run.engine.definition)
    with torch.no_grad():
        logits = trained(inputs)["logits"]
        destroy_groups()  # evaluation makes its own
        loaded = load_trained(open_checkpoint(config.training.run_dir), "cpu")[1].network
        return logits, loaded(inputs)["logits"], {tensor.dtype for model in (trained, loaded) for tensor in model.parameters()}


@pytest.fixture(scope="module")
def server():
    with ForkServer() as started:
        yield started


@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_of_a_bf16_run_gives_the_logits_of_the_run(server, small_data, tmp_path, family):
    config = small_data.config(
        tmp_path / "run", model={"num_layers": 2, **FAMILIES[family]}, parallel={"zero_stage": 1},
        training={"train_iters": 3, "precision": "bf16", "eval_iters": 0},
    )
    (trained, loaded, dtypes), = server.run(1, _train_and_load, config)
    assert dtypes == {torch.bfloat16} == {trained.dtype}
    assert torch.equal(trained, loaded)
