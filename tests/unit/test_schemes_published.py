"""Rival schemes against the constants that their papers and their authors' code publish."""

import math
import runpy
from pathlib import Path

import pytest

from megadsl.config.model import ModelConfig, SchemeConfig
from megadsl.errors import UserError
from megadsl.schemes import SCHEMES, SignalPlan, build_plan

ROOT = Path(__file__).parents[2]


def plan_of(scheme: str, settings: dict | None = None, **model) -> SignalPlan:
    config = ModelConfig(**{"num_layers": 6, "hidden_size": 64, "seq_length": 8,
                            "norm_position": SCHEMES[scheme].norm_position or "pre", **model})
    return build_plan(config, SchemeConfig(name=scheme, **(settings or {})), None, 1000)


def only(values) -> float:
    """The one value that all of them have."""
    found = set(values)
    assert len(found) == 1, found
    return found.pop()


def skips(plan: SignalPlan, stack: str) -> float:
    return only(sublayer.residual_scale for sublayer in plan.sublayers if sublayer.stack == stack)


def deepnorm_gain(plan: SignalPlan, stack: str, kind: str = "ffn") -> float:
    """beta of a stack, from a matrix whose Glorot std is known by hand: fc1 64 -> 256, value 64 -> 64."""
    sublayer = next(sublayer for sublayer in plan.layer(stack, 0) if sublayer.kind == kind)
    if kind == "ffn":
        return sublayer.weight_std["fc1"] / math.sqrt(2.0 / 320.0)
    return sublayer.weight_std["value"] / math.sqrt(2.0 / 128.0)


@pytest.mark.parametrize("family", ["decoder", "encoder"])
@pytest.mark.parametrize("layers, alpha, beta", [
    # 32 layers: the constant 2.8284271247461903 in the code of arXiv 2502.05795 ("deeppost"). 50 and 200 layers: (100)^(1/4),
    # (400)^(-1/4) and (400)^(1/4), (1600)^(-1/4), roots of squares that can be taken by hand.
    (32, 2.8284271247461903, 0.25), (50, 3.16227766, 0.2236068), (200, 4.47213595, 0.15811388),
])
def test_deepnorm_of_one_stack(family, layers, alpha, beta):
    plan = plan_of("deepnorm", family=family, num_layers=layers)
    assert skips(plan, family) == pytest.approx(alpha) and only(sublayer.branch_scale for sublayer in plan.sublayers) == 1.0
    assert deepnorm_gain(plan, family) == deepnorm_gain(plan, family, "self_attention") == pytest.approx(beta)
    attention, _ = plan.layer(family, 0)
    # Queries and keys keep Glorot's std.
    assert attention.weight_std["query"] == attention.weight_std["key"] == pytest.approx(math.sqrt(2.0 / 128.0))


def test_deepnorm_of_an_encoder_decoder():
    # 100 + 100 layers (arXiv 2203.00555's 200-layer translation model) by its table: (100^4 * 100)^(1/16) = 10^(5/8) = 4.216965;
    # .81 and .87 of it and of its inverse; 300^(1/4) and 1200^(-1/4).
    plan = plan_of("deepnorm", family="encoder_decoder", num_layers=100)
    assert skips(plan, "encoder") == pytest.approx(3.415742, abs=1e-5)
    assert skips(plan, "decoder") == pytest.approx(4.161791, abs=1e-5)
    assert deepnorm_gain(plan, "encoder") == pytest.approx(0.206310, abs=1e-5)
    assert deepnorm_gain(plan, "decoder") == deepnorm_gain(plan, "decoder", "cross_attention") == pytest.approx(0.169905, abs=1e-5)
    # 6 + 12 layers: (6^4 * 12)^(1/16) = 15552^(1/16) = 1.828044.
    uneven = plan_of("deepnorm", family="encoder_decoder", num_layers=6, num_decoder_layers=12)
    assert skips(uneven, "encoder") == pytest.approx(0.81 * 1.828044, abs=1e-5)


def test_layernorm_scaling_is_one_over_the_root_of_the_layer():
    # Layers 1, 4, 9, 16 of arXiv 2502.05795, both norms alike: 1, 1/2, 1/3, 1/4.
    plan = plan_of("layernorm_scaling", num_layers=16)
    for layer, factor in ((1, 1.0), (4, 1 / 2), (9, 1 / 3), (16, 1 / 4)):
        assert [sublayer.norm_scale for sublayer in plan.layer("decoder", layer - 1)] == [pytest.approx(factor)] * 2
    # No scaled initialisation beside it: the authors advise against it.
    assert {std for sublayer in plan.sublayers for std in sublayer.weight_std.values()} == {0.02}


@pytest.mark.parametrize("layers, gate", [(12, 0.1), (18, 0.1), (24, 1e-5), (36, 1e-6), (48, 1e-6)])
def test_layerscale_starts_where_cait_does(layers, gate):
    # 12 and 18: the paper's text; 24, 36, 48: the released CaiT models (XXS24, S36, M48).
    plan = plan_of("layerscale", num_layers=layers)
    assert {(sublayer.residual_scale, sublayer.branch_scale, sublayer.gate) for sublayer in plan.sublayers} == {(1.0, gate, "channel")}


@pytest.mark.parametrize("family", ["decoder", "encoder_decoder"])
def test_rezero_is_the_identity(family):
    plan = plan_of("rezero", family=family, hidden_dropout=0.1)
    assert plan.norm_position == "none"
    assert {(sublayer.residual_scale, sublayer.branch_scale, sublayer.gate) for sublayer in plan.sublayers} == {(1.0, 0.0, "scalar")}
    for sublayer in plan.sublayers:
        assert sublayer.forward_variance == pytest.approx(1.0) and sublayer.correlation == pytest.approx(plan.embedding.correlation)
        # The head's gradient goes down the skip unchanged; no gradient passes through a branch, so none reaches the encoder.
        assert sublayer.gradient_variance == (1.0 if sublayer.stack == "decoder" else 0.0)


def test_completep_carries_a_small_model_over():
    # m_N = 1024 / 256 = 4 and m_L = 64 / 2 = 32: table 1 of arXiv 2505.01618 with a = 1.
    shape = {"hidden_size": 1024, "num_layers": 64}
    plan = plan_of("completep", **shape)
    assert only(sublayer.branch_scale for sublayer in plan.sublayers) == 1 / 32
    assert only(std for sublayer in plan.sublayers for std in sublayer.weight_std.values()) == pytest.approx(0.01)
    assert set(plan.embedding.weight_std.values()) == {0.02} and plan.head.hidden_scale == 0.25
    assert plan.role_factors["fc1"] == plan.role_factors["query_key_value"] == {"lr": 1 / 4, "eps": 1 / 128, "weight_decay": 4.0}
    assert plan.role_factors["norm_weight"] == plan.role_factors["bias"] == {"eps": 1 / 128}
    assert plan.role_factors["word_embedding"] == {"eps": 1 / 4}

    half = plan_of("depth_mup", **shape)
    assert only(sublayer.branch_scale for sublayer in half.sublayers) == pytest.approx(32 ** -0.5)
    assert half.role_factors["fc2"] == pytest.approx({"lr": 32 ** -0.5 / 4, "eps": 32 ** -0.5 / 4, "weight_decay": 4.0})
    assert half.role_factors["norm_bias"]["lr"] == pytest.approx(32 ** -0.5)


def test_completep_at_the_base_is_the_base():
    plan = plan_of("completep", {"base_num_layers": 6, "base_hidden_size": 64})
    assert plan.role_factors == {} and plan.head.hidden_scale == 1.0
    assert only(sublayer.branch_scale for sublayer in plan.sublayers) == 1.0
    assert SignalPlan.from_json(plan_of("completep").to_json()).role_factors == plan_of("completep").role_factors != {}


def test_keel_multiplies_the_skip_by_the_number_of_sublayers():
    # arXiv 2601.19895: alpha is the total number of sublayers, 1024 for 512 layers.
    plan = plan_of("keel", num_layers=512)
    assert plan.norm_position == "both" and skips(plan, "decoder") == 1024.0
    both = plan_of("keel", family="encoder_decoder", num_layers=4)
    assert skips(both, "encoder") == 8.0 and skips(both, "decoder") == 12.0


@pytest.mark.parametrize("scheme", [name for name, scheme in SCHEMES.items() if scheme.norm_position])
def test_a_scheme_names_the_norm_position_that_it_goes_with(scheme):
    needed = SCHEMES[scheme].norm_position
    with pytest.raises(UserError, match=f"{scheme} goes with model.norm_position={needed}"):
        plan_of(scheme, norm_position="post" if needed == "pre" else "pre")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_says_what_it_is(scheme):
    what, formula = SCHEMES[scheme].description
    assert ("arXiv" in what or "19" in what or "20" in what) and what.endswith(".") and formula


def test_the_table_in_the_docs_is_current():
    page = (ROOT / "docs" / "theory.md").read_text(encoding="utf-8")
    assert runpy.run_path(str(ROOT / "tools" / "document_schemes.py"))["document"](page) == page
    assert all(f"| `{name}` |" in page for name in SCHEMES)
