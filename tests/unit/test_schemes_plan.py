"""Schemes: the numbers that they stand for, the plan's JSON and look-ups, and the convention of lambda and beta."""

import math

import pytest

from megadsl.config.model import ModelConfig, SchemeConfig
from megadsl.errors import UserError
from megadsl.schemes import SCHEMES, SignalPlan, build_plan
from megadsl.schemes.plan import ATTENTION_ROLES, FFN_ROLES
from megadsl.theory.inputs import TokenStatistics

FAMILIES = ("decoder", "encoder", "encoder_decoder")


def plan_of(scheme: str, k: float = 2.0, statistics: TokenStatistics | None = None, **model) -> SignalPlan:
    config = ModelConfig(**{"num_layers": 6, "hidden_size": 64, "seq_length": 32, **model})
    return build_plan(config, SchemeConfig(name=scheme, k=k), statistics, 1000)


def test_lambda_multiplies_the_skip_and_beta_the_branch():
    # The convention of plan.py: DSLM keeps nearly all of the skip and adds little of the branch, and both squares sum to one.
    for sublayer in plan_of("dslm", num_layers=192).sublayers:
        assert sublayer.residual_scale > 0.99 and sublayer.branch_scale < 0.1
        assert sublayer.residual_scale ** 2 + sublayer.branch_scale ** 2 == pytest.approx(1.0, abs=1e-12)
        assert sublayer.branch_scale ** 2 == pytest.approx(2.0 / 384)


@pytest.mark.parametrize("scheme", sorted(SCHEMES))
@pytest.mark.parametrize("family", FAMILIES)
def test_json_round_trip_and_look_up(scheme, family):
    plan = plan_of(scheme, family=family, num_tokentypes=2, num_decoder_layers=4 if family == "encoder_decoder" else None,
                   norm_position=SCHEMES[scheme].norm_position or "pre", embedding_layernorm=True)
    assert SignalPlan.from_json(plan.to_json()) == plan
    stacks = {"decoder": ["decoder"], "encoder": ["encoder"], "encoder_decoder": ["encoder", "decoder"]}[family]
    for stack in stacks:
        for index in range(plan.num_layers(stack)):
            kinds = [sublayer.kind for sublayer in plan.layer(stack, index)]
            cross = family == "encoder_decoder" and stack == "decoder"
            assert kinds == (["self_attention", "cross_attention", "ffn"] if cross else ["self_attention", "ffn"])
    assert plan.num_layers("decoder") == {"decoder": 6, "encoder": 0, "encoder_decoder": 4}[family]
    with pytest.raises(KeyError):
        plan.layer(stacks[0], 99)
    for sublayer in plan.sublayers:
        assert tuple(sublayer.weight_std) == (FFN_ROLES if sublayer.kind == "ffn" else ATTENTION_ROLES)
        assert all(std > 0 for std in sublayer.weight_std.values())
    assert set(plan.embedding.weight_std) == {"word_embedding", "position_embedding", "tokentype_embedding"}


def test_vanilla_is_megatrons_default():
    plan = plan_of("vanilla", num_layers=8, untie_embeddings_and_output_weights=True)
    attention, ffn = plan.layer("decoder", 3)
    assert attention.weight_std == {"query": 0.02, "key": 0.02, "value": 0.02, "attention_output": 0.02 / 4}
    assert ffn.weight_std == {"fc1": 0.02, "fc2": 0.02 / 4} and ffn.residual_scale == ffn.branch_scale == 1.0
    assert set(plan.embedding.weight_std.values()) == {0.02} and plan.head.weight_std == {"output_head": 0.02}
    assert plan.head.hidden_scale == 1.0


def test_xavier_uses_the_fans_of_each_role():
    attention, ffn = plan_of("xavier", num_attention_heads=4, num_query_groups=2, kv_channels=32).layer("decoder", 0)
    expected = {"query": (64, 128), "key": (64, 64), "value": (64, 64), "attention_output": (128, 64)}
    assert attention.weight_std == {role: pytest.approx(math.sqrt(2.0 / sum(fans))) for role, fans in expected.items()}
    assert ffn.weight_std["fc1"] == ffn.weight_std["fc2"] == pytest.approx(math.sqrt(2.0 / (64 + 256)))


def test_dslm_paper_reproduces_the_released_numbers():
    # BERT, 192 layers, d = 1024, p = .1 (THEORY.md, section 8): .0456 in the first layer, .034 in the last, FFN .0256; k = 1.92
    # gives .995/.005.
    plan = plan_of("dslm_paper", k=1.92, family="encoder", num_layers=192, hidden_size=1024, num_attention_heads=16,
        hidden_dropout=0.1,
                   num_tokentypes=2)
    first, last = (plan.layer("encoder", index)[0] for index in (0, 191))
    assert first.weight_std["value"] == first.weight_std["attention_output"] == pytest.approx(0.0456, abs=5e-5)
    assert last.weight_std["value"] == pytest.approx(0.034, abs=5e-4)
    assert plan.layer("encoder", 0)[1].weight_std == {"fc1": pytest.approx(0.0256, abs=5e-5),
        "fc2": pytest.approx(0.0256, abs=5e-5)}
    assert first.residual_scale ** 2 == pytest.approx(0.995) and first.branch_scale ** 2 == pytest.approx(0.005)


def test_dslm_starts_from_unit_variance_and_unit_logits():
    for tied in (True, False):
        plan = plan_of("dslm", hidden_dropout=0.1, untie_embeddings_and_output_weights=not tied)
        tables = plan.embedding.weight_std
        assert sum(std ** 2 for std in tables.values()) == pytest.approx(0.9)
        matrix = plan.head.weight_std.get("output_head", tables["word_embedding"])
        assert 64 * (matrix * plan.head.hidden_scale) ** 2 == pytest.approx(1.0)
        assert plan.final.gradient_variance == 1.0


def test_dslm_reads_the_token_statistics():
    often = TokenStatistics(vocab_size=1000, repeat_probability=0.02, repeat_probability_in_sequence=0.3)
    rare = TokenStatistics(vocab_size=1000, repeat_probability=0.02)
    first = [plan_of("dslm", statistics=statistics).layer("decoder", 0)[0].weight_std["value"] for statistics in (often, rare)]
    # Repeated tokens average less: their attention branch needs smaller weights.
    assert first[0] < 0.95 * first[1]


@pytest.mark.parametrize("family", FAMILIES)
def test_dslm_predicts_unit_variance_and_vanilla_does_not(family):
    unit = [sublayer.forward_variance for sublayer in plan_of("dslm", family=family, hidden_dropout=0.1).sublayers]
    assert unit == pytest.approx([1.0] * len(unit), abs=1e-3)
    assert max(sublayer.forward_variance for sublayer in plan_of("vanilla", family=family, hidden_dropout=0.1).sublayers) < 0.5


def test_mistakes_are_named():
    with pytest.raises(UserError, match="did you mean dslm"):
        plan_of("dlsm")
    with pytest.raises(UserError, match="scheme.k"):
        plan_of("dslm", num_layers=1, k=2.0)
