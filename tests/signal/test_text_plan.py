"""The plan of a head that reads one token, or the mean of all, over padded rows of unequal length: measured against the model.

The gradient of one token is one vector a row, so the draws of the weights scatter more than those of a language model do; hence 16 of
them.
"""

import random
import sysconfig
from dataclasses import replace
from pathlib import Path

import pytest
from text_data import prepared

from megadsl.config.load import parse_config

DRAWS = 16
CASES = {
    "encoder pre, first token": {"family": "encoder", "num_tokentypes": 2},
    "encoder post, first token": {"family": "encoder", "norm_position": "post", "embedding_layernorm": True},
    "encoder pre, mean": {"family": "encoder"},
    "decoder pre, last token": {"family": "decoder"},
}


@pytest.fixture(scope="module")
def lines(small_data, tmp_path_factory) -> Path:
    """Lines of the standard library's sources of 40 to 110 characters, as sentences."""
    folder = tmp_path_factory.mktemp("lines")
    library = Path(sysconfig.get_paths()["stdlib"])
    texts = [" ".join(line.split()) for name in ("email", "json") for path in sorted((library / name).glob("*.py"))
             for line in path.read_text(encoding="utf-8").splitlines() if 40 < len(line.strip()) < 110]
    random.Random(0).shuffle(texts)
    for split, rows in (("train", texts[:200]), ("dev", texts[200:220])):
        (folder / f"{split}.tsv").write_text("sentence\tlabel\n" + "".join(f"{row}\t{index % 2}\n" for index, row in enumerate(rows)))
    return prepared("text_classification", folder, small_data.tokenizer, folder / "prepared")


def configured(small_data, lines: Path, case: str, scheme: str = "dslm"):
    model = {"num_layers": 12, "hidden_size": 128, "num_attention_heads": 4, "seq_length": 64, **CASES[case]}
    return parse_config({
        "model": model, "scheme": scheme, "tokenizer": {"model": str(small_data.tokenizer)}, "data": {"datasets": [str(lines)]},
        "task": {"name": "text_classification", **({"pooling": "mean"} if "mean" in case else {})},
    })


@pytest.mark.parametrize("case", CASES)
def test_forward_within_a_tenth_gradient_within_a_fifth(small_data, lines, one_process, case):
    from megadsl.monitor.at_init import measure_at_init
    from megadsl.tasks.planning import plan_for_run

    config = configured(small_data, lines, case)
    plan = plan_for_run(config)
    measured = measure_at_init(config, plan, DRAWS)
    for predicted, found in zip([plan.embedding, *plan.sublayers], measured, strict=True):
        assert found.forward_variance == pytest.approx(predicted.forward_variance, rel=0.1)
        assert found.forward_variance == pytest.approx(1.0, rel=0.1)
        assert found.correlation == pytest.approx(predicted.correlation, abs=0.05)
        assert found.gradient_variance == pytest.approx(predicted.gradient_variance, rel=0.2)


def test_vanilla_is_not_at_unit_variance(small_data, lines, one_process):
    from megadsl.monitor.at_init import measure_at_init
    from megadsl.tasks.planning import plan_for_run

    config = configured(small_data, lines, "encoder pre, first token", "vanilla")
    assert max(point.forward_variance for point in measure_at_init(config, plan_for_run(config), 1)) < 0.2


def test_what_the_plan_would_be_without_the_length_and_the_position(small_data, lines):
    """The plan changes with each of them."""
    from megadsl.schemes.registry import build_plan
    from megadsl.tasks.registry import task_of

    task = task_of(configured(small_data, lines, "encoder pre, first token"))
    statistics = task.input_statistics()
    assert 15 < statistics.length < 45

    def plan(of, **changes):
        return build_plan(of.model, of.config.scheme, replace(of.input_statistics(), **changes), statistics.vocab_size)

    own = plan(task)
    untyped = task_of(configured(small_data, lines, "encoder pre, mean"))
    assert plan(untyped, length=512.0).sublayers[0].weight_std["value"] > 1.03 * plan(untyped).sublayers[0].weight_std["value"]
    mean = plan(task, gradient_correlation=1.0, read_position=None)
    assert mean.sublayers[0].gradient_variance > 4 * own.sublayers[0].gradient_variance
    decoder = task_of(configured(small_data, lines, "decoder pre, last token"))
    anywhere, last = plan(decoder, read_position=None), plan(decoder)
    assert abs(anywhere.sublayers[0].gradient_variance / last.sublayers[0].gradient_variance - 1.0) > 0.03
