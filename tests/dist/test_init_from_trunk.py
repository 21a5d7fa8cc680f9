"""checkpoint.init_from takes another run's trunk: another task and head, another length, in every layout, and says what it took."""

from pathlib import Path

import pytest
import torch
from layout_runs import LAYOUTS, REFERENCE, train, weights
from ranks import ForkServer
from vector_task import write_vectors

from megadsl.checkpoint.store import open_checkpoint
from megadsl.errors import UserError

# So small that Adam's steps do not change a weight in fp32.
NO_STEPS = {"lr": 1e-30, "weight_decay": 0.0, "lr_warmup_iters": 0}


@pytest.fixture(scope="module")
def server():
    with ForkServer() as started:
        yield started


@pytest.fixture(scope="module")
def pretrained(server, small_data, tmp_path_factory) -> dict[str, Path]:
    folder, runs = tmp_path_factory.mktemp("pretrained"), {}
    for family, model in (("encoder", {"num_layers": 4, "num_tokentypes": 2}), ("decoder", {"num_layers": 2})):
        runs[family] = folder / family
        server.run(1, train, small_data.config(runs[family], model={"family": family, **model}, training={"train_iters": 3}))
    return runs


@pytest.mark.parametrize("layout", [REFERENCE, *LAYOUTS], ids=str)
def test_another_task_takes_the_trunk(server, small_data, pretrained, tmp_path, layout):
    tensor, pipeline, data, zero = layout
    config = small_data.config(
        tmp_path / "run", model={"family": "encoder", "seq_length": 16, "num_layers": 4}, tokenizer={"model": "none"},
        task={"name": "vector_classification"}, data={"datasets": [str(write_vectors(tmp_path / "data"))]}, optimizer=NO_STEPS,
        parallel={"tensor_model_parallel_size": tensor, "pipeline_model_parallel_size": pipeline, "zero_stage": zero},
        training={"train_iters": 1}, checkpoint={"init_from": str(pretrained["encoder"])})
    said = server.run(tensor * pipeline * data, train, config)[0]
    theirs, ours = weights(pretrained["encoder"]), weights(tmp_path / "run")
    trunk = {name for name in ours if name.startswith(("encoder.", "final_norm"))}
    assert len(trunk) == 4 * 12 + 2 and all(torch.equal(ours[name], theirs[name]) for name in trunk)
    assert f"{len(trunk) + 1} tensors taken, 3 fresh (classifier.linear.bias, classifier.linear.weight, embedding.projection" in said
    assert "left out (embedding.tokentype, embedding.word.table.weight, lm_head.dense.bias, ...)" in said
    assert "learned positions: embedding.position from 32 to 16 rows, interpolated" in said
    projection = ours["embedding.projection.linear.weight"]
    assert projection.std() == pytest.approx(open_checkpoint(tmp_path / "run").plan().embedding.weight_std["input_projection"], rel=0.15)
    assert ours["embedding.position"].shape == (16, 32)
    assert torch.allclose(ours["embedding.position"][[0, -1]], theirs["embedding.position"][[0, -1]], atol=1e-6)


@pytest.mark.parametrize("how", ["interpolate", "fresh"])
def test_longer_sequences(server, small_data, pretrained, tmp_path, how):
    config = small_data.config(
        tmp_path, model={"num_layers": 2, "seq_length": 48}, optimizer=NO_STEPS, training={"train_iters": 1},
        checkpoint={"init_from": str(pretrained["decoder"]), "init_positions": how})
    said = server.run(1, train, config)[0]
    theirs, ours = weights(pretrained["decoder"])["embedding.position"], weights(tmp_path)["embedding.position"]
    assert ours.shape == (48, 32) and torch.isfinite(ours).all()
    if how == "fresh":
        assert "from 32 to 48 rows, 16 rows fresh" in said and torch.equal(ours[:32], theirs)
        std = open_checkpoint(tmp_path).plan().embedding.weight_std["position_embedding"]
        assert ours[32:].std() == pytest.approx(std, rel=4 / (2 * ours[32:].numel()) ** 0.5)
    else:
        # Row i of 48 lies at 31 i / 47 of the old ones.
        place = torch.arange(48) * 31 / 47
        low, share = place.floor().long().clamp(max=30), (place - place.floor().clamp(max=30))[:, None]
        assert torch.allclose(ours, theirs[low] * (1 - share) + theirs[low + 1] * share, atol=1e-5)


@pytest.mark.parametrize("sections, sentence", [
    ({"model": {"num_layers": 2, "hidden_size": 64}}, "model.hidden_size is 64, but checkpoint.init_from .* was trained with 32; set it so"),
    ({"model": {"num_layers": 2}, "scheme": {"name": "vanilla"}}, "scheme.name is vanilla, but checkpoint.init_from .* with dslm"),
])
def test_another_trunk_is_refused_by_its_key(small_data, pretrained, tmp_path, sections, sentence):
    from megadsl.training.preflight import preflight

    with pytest.raises(UserError, match=sentence):
        preflight(small_data.config(tmp_path, checkpoint={"init_from": str(pretrained["decoder"])}, **sections))


def test_resuming_with_other_data_is_refused_or_said(server, small_data, pretrained, tmp_path):
    """The same run with the data weighted otherwise: refused by its key, or accepted with a line."""
    from megadsl.training.preflight import preflight

    run_dir = tmp_path / "run"
    server.run(1, train, small_data.config(run_dir, training={"train_iters": 2}, model={"num_layers": 2}))
    other = {"datasets": [{"path": str(small_data.dataset), "weight": 0.5}, {"path": str(small_data.dataset), "weight": 0.5}]}
    config = small_data.config(run_dir, training={"train_iters": 3}, model={"num_layers": 2}, data=other)
    with pytest.raises(UserError, match="data.datasets.0 is not the data that .* was trained with; .* checkpoint.allow_data_change=true"):
        preflight(config)
    allowed = small_data.config(run_dir, training={"train_iters": 3}, model={"num_layers": 2}, data=other, checkpoint={"allow_data_change": True})
    assert "warning: data.datasets.0 is not the data that" in server.run(1, train, allowed)[0]


def test_a_complete_run_that_is_started_again_stays_as_it_is(server, small_data, tmp_path):
    config = small_data.config(tmp_path, training={"train_iters": 2}, model={"num_layers": 2})
    first = server.run(1, train, config)[0]
    assert "done at iteration 2 | loss" in first and "above" not in first
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and "checkpoints" not in path.parts}
    again = server.run(1, train, small_data.config(tmp_path, training={"train_iters": 2}, model={"num_layers": 2}, optimizer={"lr": 1e-4}))[0]
    assert "complete at iteration 2" in again and "validation" not in again
    assert {path: path.read_bytes() for path in before} == before


def test_a_run_that_ends_above_its_first_loss_says_so(server, small_data, tmp_path):
    said = server.run(1, train, small_data.config(
        tmp_path, model={"num_layers": 2}, training={"train_iters": 6, "eval_iters": 0}, optimizer={"lr": 3.0, "clip_grad": 0.0}))[0]
    assert "warning: the loss ends above where it began" in said.splitlines()[-1]
