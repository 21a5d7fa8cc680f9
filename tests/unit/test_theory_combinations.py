"""Every combination of parts has a plan: finite at both levels, of unit variance under DSLM, and equal between the levels where
positions are exchangeable."""

import math
import random
from functools import partial

import numpy as np
import pytest

from megadsl.config.model import ModelConfig, SchemeConfig
from megadsl.schemes.assemble import profile_of
from megadsl.schemes.registry import SCHEMES, build_parametrization
from megadsl.theory import cross_entropy_gradient, zipf
from megadsl.theory.inputs import TokenStatistics
from megadsl.theory.profile import MASKED_SHARE

PARTS = {
    "family": ("decoder", "encoder", "encoder_decoder"), "norm_position": ("pre", "post"),
    "activation": ("relu", "gelu", "tanh_gelu", "silu", "squared_relu", "swiglu", "geglu"),
    "normalization": ("LayerNorm", "RMSNorm"),
    "position_embedding_type": ("learned_absolute", "sinusoidal", "rope", "relative", "none"),
    "num_query_groups": (1, 2, 4), "qk_layernorm": (False, True), "embedding_layernorm": (False, True),
    "hidden_dropout": (0.0, 0.1, 0.3), "attention_dropout": (0.0, 0.1), "num_tokentypes": (0, 1, 2),
    "untie_embeddings_and_output_weights": (False, True), "decoder_seq_length": (None, 24), "kv_channels": (None, 32),
    "attention_logit_softcap": (0.0, 0.0, 0.0, 1.0),
}


def values(scheme: str, model: ModelConfig, level: str, statistics: TokenStatistics | None = None) -> np.ndarray:
    parametrization = build_parametrization(model, SchemeConfig(name=scheme), 512)
    found = profile_of(parametrization, model, statistics or zipf(512), 512, level)
    return np.array([point.values() for point in (found.embedding, *found.predictions, found.final)])


def drawn(seed: int, **fixed) -> ModelConfig:
    choose = random.Random(seed)
    parts = {name: choose.choice(options) for name, options in PARTS.items()}
    return ModelConfig(num_layers=4, hidden_size=64, seq_length=40, **{**parts, **fixed})


@pytest.mark.parametrize("seed", range(60))
def test_dslm_has_unit_variance_with_all_parts(seed):
    model = drawn(seed)
    for level in ("matrix", "scalar"):
        found = values("dslm", model, level)
        assert np.isfinite(found).all()
        assert found[:, 0] == pytest.approx(np.ones(len(found)), abs=1e-3)
        assert (np.abs(found[:, 1]) <= 1.0).all() and (found[:, 2] > 0.0).all()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_has_a_plan_with_all_parts(scheme):
    position = SCHEMES[scheme].norm_position
    for seed in range(8):
        model = drawn(100 + seed, **({"norm_position": position} if position else {}))
        for level in ("matrix", "scalar"):
            assert np.isfinite(values(scheme, model, level)).all()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_levels_agree_in_encoders(scheme):
    position = SCHEMES[scheme].norm_position or "pre"
    for seed in range(3):
        model = drawn(seed, family="encoder", norm_position=position, position_embedding_type="learned_absolute")
        matrix, scalar = (values(scheme, model, level) for level in ("matrix", "scalar"))
        assert scalar == pytest.approx(matrix, rel=2e-2, abs=1e-3)


def test_relative_positions_start_as_none():
    model = partial(ModelConfig, num_layers=4, hidden_size=64, seq_length=40)
    assert np.array_equal(values("dslm", model(position_embedding_type="relative"), "matrix"),
                          values("dslm", model(position_embedding_type="none"), "matrix"))


def test_masked_input_repeats_the_mask_token():
    # 15 % chosen, 80 % of them masked: .12^2 = .0144 of the pairs are two masks, (1 - .135)^2 = .748225 are two kept words.
    plain = TokenStatistics(vocab_size=10 ** 9, repeat_probability=0.02)
    masked = TokenStatistics(vocab_size=10 ** 9, repeat_probability=0.02, masking_probability=0.15)
    assert plain.input_repeats == 0.02 and masked.input_repeats == pytest.approx(0.748225 * 0.02 + 0.0144, abs=1e-8)
    model = ModelConfig(family="encoder", num_layers=2, hidden_size=64, seq_length=40, position_embedding_type="none")
    assert values("dslm", model, "matrix", masked)[0, 1] == pytest.approx(masked.input_repeats)


def test_token_types_are_as_the_statistics_say():
    model = ModelConfig(family="encoder", num_layers=2, hidden_size=64, position_embedding_type="none", num_tokentypes=2)
    for probability, expected in ((None, 2.0 / 3.0), (1.0, 1.0), (0.5, 0.5)):
        statistics = TokenStatistics(vocab_size=1000, repeat_probability=0.02, same_type_probability=probability)
        assert values("dslm", model, "matrix", statistics)[0, 1] == pytest.approx(0.5 * 0.02 + 0.5 * expected)


def test_the_embedding_norm_sets_the_scale_and_keeps_the_correlation():
    for scheme, second in (("dslm", 1.0), ("vanilla", 1.0 / 0.9)):
        shape = {"num_layers": 2, "hidden_size": 64, "hidden_dropout": 0.1, "layernorm_epsilon": 1e-12}
        plain, normed = (values(scheme, ModelConfig(embedding_layernorm=on, **shape), "matrix")[0] for on in (False, True))
        assert normed[0] == pytest.approx(second, rel=1e-6) and normed[1] == pytest.approx(plain[1])


def test_berts_head_decorrelates_the_gradient():
    final = values("dslm", ModelConfig(family="encoder", num_layers=2, hidden_size=64, activation="relu"), "matrix")[-1]
    # The part of order 1/d lies along the state that the transform's norm divides by, and is taken away.
    bare = MASKED_SHARE * cross_entropy_gradient(math.inf, 512, zipf(512).repeat_probability, final[1])[1]
    # ReLU: E f'f'(r) / E f'^2 = 1/2 + arcsin(r)/pi; the correlation behind the unit changes the rest by little.
    assert final[3] / bare == pytest.approx(0.5 + np.arcsin(final[1]) / np.pi, rel=0.1)
