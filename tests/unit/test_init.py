"""Parameter tags: what is drawn has the planned deviation by role, and slices put together give the whole."""

from math import erfc

import numpy as np
import pytest
import torch
from scipy.stats import kstest

from megadsl.config.training import OptimizerConfig
from megadsl.model.init import ParameterTag, initialize, leave_to_checkpoint, tag, tag_of
from megadsl.model.normal import CHUNK, normal_numbers
from megadsl.training.optimizer import parameter_groups

TAGS = {
    "column": ParameterTag("fc1", (96, 32), {"fc1": 0.3}, partition_dim=0),
    "row": ParameterTag("fc2", (32, 96), {"fc2": 0.2}, partition_dim=1),
    "gated": ParameterTag("fc1", (96, 32), {"gate": 0.3, "up": 0.5}, partition_dim=0, blocks=2),
    "qkv": ParameterTag("query_key_value", (4 * (2 + 2) * 8, 64), {"query": 0.1, "key": 0.2, "value": 0.4}, partition_dim=0,
                        group_rows=(16, 8, 8)),
    "replicated": ParameterTag("position_embedding", (40, 32), {"position_embedding": 0.7}),
    "key_value": ParameterTag("key_value", (8 * 2 * 4, 24), {"key": 0.2, "value": 0.4}, partition_dim=0, group_rows=(4, 4)),
    # An odd number of numbers in every slice, so that pairs lie across the cuts.
    "odd_rows": ParameterTag("output_head", (12, 3), {"output_head": 0.3}, partition_dim=0),
    "odd_columns": ParameterTag("fc2", (3, 12), {"fc2": 0.3}, partition_dim=1),
    "constant": ParameterTag("norm_weight", (32,), {}, constant=1.0),
    "sliced_constant": ParameterTag("bias", (32,), {}, partition_dim=0, blocks=2),
}


@pytest.mark.parametrize("value", TAGS.values(), ids=TAGS)
@pytest.mark.parametrize("size", [1, 2, 4])
def test_shards_put_together_are_the_full_tensor(value, size):
    full = value.draw(1, "name")
    shards = [value.shard(full, rank, size) for rank in range(size)]
    assert torch.equal(value.unshard(shards), full)
    if size > 1 and value.partition_dim is not None:
        assert shards[0].numel() * size == full.numel() and (not value.std or not torch.equal(shards[0], shards[1]))


@pytest.mark.parametrize("value", TAGS.values(), ids=TAGS)
@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_rank_draws_its_shard_and_nothing_else(value, size, monkeypatch):
    """Bit-equal to the slice of the full tensor, from as many numbers as it has (and the other half of a pair at either end)."""
    asked = []

    def counted(generator, count):
        asked.append(2 * count)
        return random_raw(generator, count)

    random_raw, make = np.random.PCG64DXSM.random_raw, np.random.PCG64DXSM
    monkeypatch.setattr(np.random, "PCG64DXSM", type("Counted", (make,), {"random_raw": counted}))
    full = value.draw(7, "name")
    assert sum(asked) == (full.numel() if value.std else 0)
    for rank in range(size):
        asked.clear()
        drawn = value.draw(7, "name", rank, size)
        assert torch.equal(drawn, value.shard(full, rank, size)) and drawn.shape == value.shard_shape(size)
        streams = len(value.std) or 1
        assert sum(asked) <= (drawn.numel() + 2 * streams if value.std else 0)


def test_numbers_depend_on_their_position_only():
    """Ranges that begin and end anywhere, over the borders of the chunks, are bit-equal to the same part of the whole."""
    whole = normal_numbers(5, 0, 5 * CHUNK + 3, 0.7)
    ends = [0, 1, 2, 17, 2 * CHUNK - 1, 2 * CHUNK, 2 * CHUNK + 1, 3 * CHUNK + 5, len(whole)]
    for start in ends:
        for end in ends:
            if start < end:
                assert np.array_equal(normal_numbers(5, start, end - start, 0.7), whole[start:end])
    assert np.array_equal(normal_numbers(5, 10**12, 99, 0.7)[9:], normal_numbers(5, 10**12 + 9, 90, 0.7))


def test_numbers_are_normal_and_independent():
    """Moments, tails and the distribution function within five standard errors; no correlation between neighbours, the halves of
    pairs, parts of a stream or streams."""
    count = 1 << 21
    numbers = normal_numbers(1, 0, count, 1.0).astype(np.float64)
    bound = 5 / count**0.5
    for power, mean, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((numbers**power).mean() - mean) < bound * variance**0.5
    # Kolmogorov and Smirnov: sqrt(n) D exceeds 2 with probability 2 exp(-8) = 7e-4, and the draw is fixed.
    assert kstest(numbers, "norm").statistic * count**0.5 < 2
    beyond = erfc(4 / 2**0.5)
    assert (abs(numbers) > 4).mean() == pytest.approx(beyond, abs=5 * (beyond / count) ** 0.5)
    for lag in (1, 2, 3, 1024, 2 * CHUNK):
        assert abs((numbers[lag:] * numbers[:-lag]).mean()) < bound * (count / (count - lag)) ** 0.5
        # Box and Muller's pairs share a radius: their squares must not be correlated either.
        assert abs(((numbers[lag:] ** 2 - 1) * (numbers[:-lag] ** 2 - 1)).mean()) < 2 * bound * (count / (count - lag)) ** 0.5
    for other in (normal_numbers(2, 0, count, 1.0), normal_numbers(1, count, count, 1.0)):
        assert abs((numbers * other).mean()) < bound


def test_the_stream_is_what_it_was():
    """Computed once with numpy 2.4 (its bit generators are frozen); another value means that a seed means other weights."""
    assert normal_numbers(2**100 + 7, 3, 4, 1.0) == pytest.approx([0.47649, 0.5782123, -0.1878139, 1.06645], rel=1e-5)


def test_threads_do_not_change_the_weights():
    filled = []
    for threads in (1, 3):
        parameters = []
        for copy in range(8):
            for name, value in TAGS.items():
                parameter = torch.nn.Parameter(torch.full(value.full_shape, float("nan")))
                tag(parameter, value)
                parameters.append((f"{name}.{copy}", parameter))
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            initialize(parameters, 5, 0, 1)
            assert torch.get_num_threads() == threads
        finally:
            torch.set_num_threads(before)
        filled.append(torch.cat([parameter.detach().view(-1) for _, parameter in parameters]))
    assert torch.equal(*filled)


def test_what_a_checkpoint_must_fill_is_nan_until_then():
    parameter = torch.nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))
    with pytest.raises(RuntimeError, match="has no role"):
        leave_to_checkpoint([("some.name", parameter)])
    tag(parameter, TAGS["constant"])
    leave_to_checkpoint([("some.name", parameter)])
    assert parameter.isnan().all()


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
    assert {id(p) for p in free["params"]} == {id(p) for name, p in parameters if name in ("replicated", "constant", "sliced_constant")}


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
