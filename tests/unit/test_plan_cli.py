"""`megadsl plan`: table, JSON, figure, comparison, and where the token statistics come from."""

import json

import pytest
from typer.testing import CliRunner

from megadsl.cli.main import app
from megadsl.errors import UserError
from megadsl.schemes import SignalPlan


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "model.yaml"
    path.write_text("model:\n  num_layers: 40\n  hidden_size: 64\n  seq_length: 32\n", encoding="utf-8")
    return str(path)


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["plan", *arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_json_is_the_plan(config):
    plan = SignalPlan.from_json(run(config, "--json"))
    assert plan.scheme == "dslm" and len(plan.sublayers) == 80


def test_table_is_abbreviated_unless_full(config):
    short, full = run(config), run(config, "--full")
    assert "more: --full" in short and "more: --full" not in full and len(full.splitlines()) > 80 > len(short.splitlines())
    assert "Zipf" in short and "hidden_scale" in short


def test_compare_puts_schemes_beside_each_other(config, tmp_path):
    figure = tmp_path / "depth.png"
    text = run(config, "--compare", "dslm,vanilla,deepnorm", "--figure", str(figure), "--full")
    assert figure.stat().st_size > 10_000
    header = next(line for line in text.splitlines() if "vanilla" in line)
    # DeepNorm is Post-LN, which the configuration is not.
    assert header.split() == ["dslm", "vanilla", "deepnorm", "(post)"]
    plans = [SignalPlan(**plan) for plan in json.loads(run(config, "--compare", "dslm,vanilla,deepnorm", "--json"))]
    assert [(plan.scheme, plan.norm_position) for plan in plans] == [("dslm", "pre"), ("vanilla", "pre"), ("deepnorm", "post")]
    # One row for each of the 80 sublayers: variance, correlation, gradient of every scheme.
    rows = [line.split() for line in text.splitlines() if "self_attention" in line or "ffn" in line]
    assert len(rows) == 80
    found = [[float(number) for number in row[-9:]] for row in rows]
    for position, plan in enumerate(plans):
        for row, point in zip(found, plan.sublayers, strict=True):
            expected = point["forward_variance"], point["correlation"], point["gradient_variance"]
            assert row[3 * position:3 * position + 3] == pytest.approx(expected, rel=5e-3, abs=5e-4)


def test_compare_all_is_every_scheme_that_goes_with_the_model(config):
    for norm, expected in (("pre", {"rezero", "layerscale", "completep"}), ("post", {"deepnorm", "keel"})):
        names = {plan["scheme"] for plan in json.loads(run(config, f"model.norm_position={norm}", "--compare", "all", "--json"))}
        assert expected | {"dslm", "vanilla", "xavier"} <= names
        assert ("keel" in names) == (norm == "post") and ("rezero" in names) == (norm == "pre")
    table = run(config, "--compare", "all")
    assert "rezero (none)" in table and "completep, optimizer: query_key_value" in table and "lr x 4" in table


def test_one_scheme_shows_what_is_special_about_it(config):
    assert "norm x 0.7071" in run(config, "scheme=layernorm_scaling")
    assert "one number a channel" in run(config, "scheme=layerscale") and "no norms" in run(config, "scheme=rezero")
    assert "0.9487" in run(config, "model.embedding_layernorm=true", "model.hidden_dropout=0.1")
    assert "head_dense 0.125" in run(config, "model.family=encoder")


def test_remedies_say_what_they_change(config):
    from megadsl.theory.softcap import capped_variance, passed_gradient

    assert "soft cap" not in run(config) and "QK-norm" not in run(config) and "z-loss" not in run(config)
    capped = run(config, "model.attention_logit_softcap=1")
    # dslm starts with scores of variance 1 behind its norms.
    assert (f"soft cap 1: attention scores of variance 1 enter the softmax with {capped_variance(1.0, 1.0):.4g}, and "
            f"{passed_gradient(1.0, 1.0):.4g} of a gradient's variance") in capped
    assert "dslm, QK-norm: attention scores have variance 1" in run(config, "model.qk_layernorm=true")
    # ln 32,000 + 1/2 = 10.87
    assert "z-loss 0.0001: logsumexp of the logits starts near 10.9, which adds 0.0118 to the loss" in run(config, "task.z_loss=1e-4")


def test_an_encoder_reads_masked_text(config):
    shape = ("model.family=encoder", "model.position_embedding_type=none", "--json")
    often, seldom = (SignalPlan.from_json(run(config, f"task.masking_probability={share}", *shape)) for share in (0.5, 0.01))
    # .16 of the pairs are two masks, .55^2 two kept words.
    assert often.embedding.correlation == pytest.approx(0.16 + 0.3025 * seldom.embedding.correlation, abs=1e-3)
    assert often.final.gradient_correlation > 20.0 * seldom.final.gradient_correlation


def test_token_types_are_one_unless_there_are_two_parts(config):
    shape = ("model.family=encoder", "model.position_embedding_type=none", "model.num_tokentypes=2", "--json")
    one, two = (SignalPlan.from_json(run(config, f"task.sentence_order={on}", *shape)) for on in ("false", "true"))
    assert one.embedding.correlation - two.embedding.correlation == pytest.approx(0.5 * (1.0 - 13.0 / 24.0), abs=1e-6)


def test_statistics_of_the_dataset_are_used(config, tmp_path):
    folder = tmp_path / "dataset"
    folder.mkdir()
    (folder / "stats.json").write_text(json.dumps({
        "vocab_size": 777, "num_tokens": 5000, "repeat_probability": 0.02, "repeat_probability_in_sequence": 0.2,
        "unigram_entropy": 5.0,
    }), encoding="utf-8")
    text = run(config, f"data.datasets=[{folder}]")
    assert "vocabulary 777" in text and "0.2000" in text and "5,000 tokens" in text
    plan = SignalPlan.from_json(run(config, f"data.datasets=[{folder}]", "--json"))
    # Two tables of equal variance, of which one repeats with probability .2.
    assert plan.embedding.correlation == pytest.approx(0.1)


@pytest.mark.parametrize("arguments",
    [["scheme=nothing"], ["--compare", "dslm,nothing"], ["--figure", "figure.doc"], ["model.layers=3"], ["scheme=deepnorm"]])
def test_mistakes_are_one_sentence(config, arguments):
    with pytest.raises(UserError) as mistake:
        run(config, *arguments)
    assert len(str(mistake.value).splitlines()) == 1
