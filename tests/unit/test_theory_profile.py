"""Depth profiles: both levels, what must be equal between them, speed, and that the theory needs no torch."""

import subprocess
import sys

import numpy as np
import pytest

from megadsl.config.model import ModelConfig, SchemeConfig
from megadsl.errors import UserError
from megadsl.schemes.assemble import profile_of
from megadsl.schemes.registry import build_parametrization
from megadsl.theory import zipf
from megadsl.theory.inputs import TokenStatistics, cross_entropy_gradient, embedding_moments, mixed
from megadsl.theory.shape import Embedding


def profile(level: str = "matrix", scheme: str = "dslm", k: float = 2.0, **model):
    config = ModelConfig(**{"num_layers": 12, "hidden_size": 64, "seq_length": 64, **model})
    return profile_of(build_parametrization(config, SchemeConfig(name=scheme, k=k), 4096), config, zipf(4096), 4096, level)


def values(found) -> np.ndarray:
    return np.array([point.values() for point in (found.embedding, *found.predictions, found.final)])


@pytest.mark.parametrize("scheme", ["dslm", "vanilla", "xavier"])
@pytest.mark.parametrize("norm", ["pre", "post"])
def test_levels_agree_where_positions_are_exchangeable(scheme, norm):
    shape = {"family": "encoder", "norm_position": norm, "hidden_dropout": 0.1, "num_tokentypes": 2}
    assert values(profile("scalar", scheme, **shape)) == pytest.approx(values(profile("matrix", scheme, **shape)), rel=2e-2,
        abs=1e-4)


@pytest.mark.parametrize("level", ["matrix", "scalar"])
@pytest.mark.parametrize("family", ["decoder", "encoder"])
def test_collapsed_ranks_are_finite(family, level):
    # All tokens become one without dropout: score variances of 1e-7, correlations of 1.
    found = values(profile(level, "xavier", family=family, norm_position="post", num_layers=192))
    assert np.isfinite(found).all() and found[-1, 1] == pytest.approx(1.0, abs=0.01)


def test_levels_differ_for_causal_attention():
    # The gradient piles up on early positions, which the scalar level cannot see (THEORY.md, section 4).
    scalar, matrix = profile("scalar").embedding, profile("matrix").embedding
    assert matrix.gradient_variance > 1.1 * scalar.gradient_variance
    assert matrix.gradient_correlation < 0.6 * scalar.gradient_correlation


def test_the_profile_of_dslm_depends_on_k_and_not_on_depth():
    ends = [profile(num_layers=layers).final.correlation for layers in (24, 192)]
    assert ends[0] == pytest.approx(ends[1], abs=0.02)
    assert profile(k=1.0).final.correlation < 0.8 * profile(k=2.0).final.correlation


def test_unit_branches_hold_for_every_activation_and_norm():
    for activation in ("relu", "gelu", "silu", "tanh_gelu", "squared_relu", "swiglu", "geglu"):
        found = profile(activation=activation, hidden_dropout=0.1, attention_dropout=0.1, position_embedding_type="rope")
        assert [point.forward_variance for point in found.predictions] == pytest.approx([1.0] * 24, abs=1e-3)
    assert values(profile(activation="swiglu"))[0, 2] > 1.5 * values(profile(activation="relu"))[0, 2]


def test_shape_options_are_read():
    base = values(profile())
    for change in ({"seq_length": 128}, {"num_attention_heads": 16}, {"hidden_dropout": 0.2}, {"attention_dropout": 0.3},
        {"qk_layernorm": True},
                   {"position_embedding_type": "rope"}, {"position_embedding_type": "sinusoidal"}, {"norm_position": "post"},
                   {"family": "encoder"}):
        assert np.abs(values(profile(**change)) - base).max() > 1e-3, change


def test_npz_json_and_figure(tmp_path):
    found = profile()
    found.save_npz(tmp_path / "profile.npz")
    found.figure(tmp_path / "profile.png")
    with np.load(tmp_path / "profile.npz") as arrays:
        assert arrays["forward_variance"].shape == (25,) and arrays["decoder_gradient_variance"].shape[0] == 25
        # The first position averages over itself only, so its attention branch is the strongest.
        assert arrays["decoder_forward_variance"][-1, 0] > arrays["decoder_forward_variance"][-1, -1]
    assert (tmp_path / "profile.png").stat().st_size > 10_000
    assert len(found.to_dict()["sublayers"]) == 24


def test_theory_and_schemes_import_without_torch():
    code = ("import sys; sys.modules['torch'] = None\n"
            "import megadsl.theory, megadsl.schemes, megadsl.theory.check, megadsl.theory.figures\n"
            "assert not {'deepspeed', 'megatron', 'matplotlib'} & set(sys.modules)")
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60).returncode == 0


def test_zipf_and_embedding_moments():
    assert zipf(30522).repeat_probability == pytest.approx(0.0138, abs=2e-4)
    bert = Embedding(1.0, 1.0, 1.0, repeat_probability=0.0138)
    q, c = embedding_moments(bert, dropout=0.1)
    assert q == pytest.approx(3 / 0.9) and c / q == pytest.approx(0.227 * 0.9, abs=1e-3)


def test_cross_entropy_gradient_is_nearly_uncorrelated():
    q, r = cross_entropy_gradient(hidden_size=1024, vocab_size=30000, repeat_probability=0.0138, correlation=0.6)
    assert 1024 * q == pytest.approx(1.0, abs=0.01) and 0.013 < r < 0.02


def test_token_statistics_prefer_the_number_within_sequences(tmp_path):
    path = tmp_path / "stats.json"
    path.write_text('{"vocab_size": 512, "num_tokens": 10, "repeat_probability": 0.02, "repeat_probability_in_sequence": 0.05, '
                    '"unigram_entropy": 5.0}', encoding="utf-8")
    found = TokenStatistics.load(path)
    assert found.repeats == 0.05
    assert mixed([(found, 1.0), (zipf(512), 3.0)]).repeats == pytest.approx((0.05 + 3.0 * zipf(512).repeats) / 4.0)
    path.write_text('{"vocab_size": 512}', encoding="utf-8")
    with pytest.raises(UserError, match="megadsl data stats"):
        TokenStatistics.load(path)
