"""Images at 96 layers: the plan starts from what the patches measure, position by position, and predicts the model behind them.

Forward second moment within 10 %, gradient variance within 20 % at every addition, as the mean over draws of the weights. Neighbouring
patches of the test's pictures resemble each other and some are darker than others, as in photographs.
"""

import numpy as np
import pytest
from image_data import image_config, prepared

DRAWS = 6
CASES = {
    "pre, class token": {"model": {"norm_position": "pre"}},
    "post, class token": {"model": {"norm_position": "post"}},
    "pre, mean, waves": {"model": {"norm_position": "pre", "seq_length": 9, "position_embedding_type": "sinusoidal"}, "task": {"pooling": "mean"}},
    "post, mean": {"model": {"norm_position": "post", "seq_length": 9}, "task": {"pooling": "mean"}},
}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return prepared(tmp_path_factory.mktemp("images"))


def configured(images, tmp_path, case: str):
    sections = CASES[case]
    model = {"num_layers": 96, "hidden_size": 128, "num_attention_heads": 4, "ffn_hidden_size": 256, **sections["model"]}
    return image_config(images, tmp_path, model=model, task=sections.get("task", {}))


def values(points) -> np.ndarray:
    return np.array([(point.forward_variance, point.gradient_variance, point.correlation) for point in points])


@pytest.mark.parametrize("case", CASES)
def test_the_plan_predicts_the_model(images, tmp_path, one_process, case):
    from megadsl.monitor.at_init import measure_at_init
    from megadsl.tasks.planning import plan_for_comparison, plan_for_run

    config = configured(images, tmp_path, case)
    plan = plan_for_run(config)
    predicted = values([plan.embedding, *plan.sublayers])
    found = values(measure_at_init(config, plan, DRAWS))
    assert agree(found, predicted), found / predicted
    assert found[0, 2] == pytest.approx(predicted[0, 2], abs=0.06)
    # The same check must tell a wrong plan.
    other = plan_for_comparison(config, "vanilla")
    assert not agree(found, values([other.embedding, *other.sublayers]))


def agree(found: np.ndarray, predicted: np.ndarray) -> bool:
    miss = np.abs(found[:, :2] / predicted[:, :2] - 1.0).max(axis=0)
    return bool(miss[0] < 0.1 and miss[1] < 0.2)
