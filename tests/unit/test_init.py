"""Parameter tags: what is drawn has the planned deviation by role, and slices put together give the whole."""

import pytest
import torch

from megadsl.config.training import OptimizerConfig
from megadsl.model.init import ParameterTag, initialize, tag, tag_of
from megadsl.training.optimizer import parameter_groups

TAGS = {
    "column": ParameterTag("fc1", (96, 32), {"fc1": 0.3}, partition_dim=0),
    "row": ParameterTag("fc2", (32, 96), {"fc2": 0.2}, partition_dim=1),
    "gated": ParameterTag("fc1", (96, 32), {"gate": 0.3, "up": 0.5}, partition_dim=0, blocks=2),
    "qkv": ParameterTag("query_key_value", (4 * (2 + 2) * 8, 64), {"query": 0.1, "key": 0.2, "value": 0.4}, partition_dim=0,
                        group_rows=(16, 8, 8)),
    "replicated": ParameterTag("position_embedding", (40, 32), {"position_embedding": 0.7}),
    "constant": ParameterTag("norm_weight", (32,), {}, constant=1.0),
}


@pytest.mark.parametrize("value", TAGS.values(), ids=TAGS)
@pytest.mark.parametrize("size", [1, 2, 4])
def test_shards_put_together_are_the_full_tensor(value, size):
    full = value.draw(1, "name")
    shards = [value.shard(full, rank, size) for rank in range(size)]
    assert torch.equal(value.unshard(shards), full)
    if size > 1 and value.partition_dim is not None:
        assert shards[0].numel() * size == full.numel() and not torch.equal(shards[0], shards[1])


def test_gated_shards_hold_gate_and_up():
    value = TAGS["gated"]
    full = value.draw(1, "name")
    gate, up = value.shard(full, 1, 2).chunk(2)
    assert torch.equal(gate, full[24:48]) and torch.equal(up, full[72:96])


def test_fused_qkv_has_a_deviation_per_role():
    drawn = TAGS["qkv"].draw(3, "name").view(4, 32, 64)
    for rows, std in ((slice(0, 16), 0.1), (slice(16, 24), 0.2), (slice(24, 32), 0.4)):
        block = drawn[:, rows]
        # The relative standard error of a deviation from m samples is 1 / sqrt(2 m); five of them.
        assert block.std().item() == pytest.approx(std, rel=5 / (2 * block.numel()) ** 0.5)


def test_draws_depend_on_seed_name_and_role_only():
    value = TAGS["column"]
    assert torch.equal(value.draw(1, "a"), value.draw(1, "a"))
    assert not torch.equal(value.draw(1, "a"), value.draw(1, "b"))
    assert not torch.equal(value.draw(1, "a"), value.draw(2, "a"))


def test_untagged_parameter_raises():
    parameter = torch.nn.Parameter(torch.zeros(3))
    with pytest.raises(RuntimeError, match="some.name has no role"):
        tag_of("some.name", parameter)


def test_every_role_is_known_or_says_whether_it_decays():
    with pytest.raises(ValueError, match="no role 'fc3' is known"):
        ParameterTag("fc3", (4, 4), {"fc3": 0.1})
    with pytest.raises(ValueError, match="role fc1 has decays=True"):
        ParameterTag("fc1", (4, 4), {"fc1": 0.1}, decays=False)
    own = []
    for role, decays in (("classifier", True), ("class_token", False)):
        parameter = torch.nn.Parameter(torch.zeros(4, 4))
        tag(parameter, ParameterTag(role, (4, 4), {role: 0.1}, decays=decays))
        own.append((role, parameter))
    groups = parameter_groups(own, OptimizerConfig(weight_decay=0.1), {"word_embedding": {"eps": 2.0}})
    assert [(group["weight_decay"], group["params"]) for group in groups] == [(0.1, [own[0][1]]), (0.0, [own[1][1]])]
    with pytest.raises(ValueError, match="factors for classifer, which no parameter is"):
        parameter_groups(own, OptimizerConfig(), {"classifer": {"lr": 0.5}})


def test_initialize_and_parameter_groups():
    parameters = []
    for name, value in TAGS.items():
        parameter = torch.nn.Parameter(torch.full(value.full_shape, float("nan")))
        tag(parameter, value)
        assert parameter.tensor_model_parallel == (value.partition_dim is not None)
        parameters.append((name, parameter))
    initialize(parameters, seed=5, tensor_rank=0, tensor_size=1)
    for name, parameter in parameters:
        assert torch.equal(parameter.detach(), TAGS[name].draw(5, name))
    options = OptimizerConfig(weight_decay=0.1)
    decayed, free = parameter_groups(parameters, options, {})
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.1, 0.0)
    assert all(group["lr_factor"] == 1 and group["eps"] == options.adam_eps for group in (decayed, free))
    assert {id(p) for p in free["params"]} == {id(p) for name, p in parameters if name in ("replicated", "constant")}


def test_the_plans_factors_reach_the_optimizer():
    parameters = []
    for name, value in TAGS.items():
        parameter = torch.nn.Parameter(torch.zeros(value.full_shape))
        tag(parameter, value)
        parameters.append((name, parameter))
    chosen = parameters[0][0]
    role = TAGS[chosen].role
    groups = parameter_groups(parameters, OptimizerConfig(weight_decay=0.1), {role: {"lr": 0.25, "eps": 0.5, "weight_decay": 4.0}})
    [group] = [group for group in groups if any(p is parameters[0][1] for p in group["params"])]
    assert (group["lr_factor"], group["eps"], group["weight_decay"]) == (0.25, 0.5e-8, 0.4)
    assert all(other["lr_factor"] == 1 for other in groups if other is not group)
