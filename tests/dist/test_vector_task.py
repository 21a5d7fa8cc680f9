"""The seam: a task that the package does not know (tests/vector_task.py) is planned, trained, resumed and evaluated in every layout."""

from pathlib import Path

import pytest
from layout_runs import (
    LAYOUTS, REFERENCE, curve, evaluated, parallel_section, require_same_curve_and_exact_resumption, require_same_on_two_processes, train,
)
from ranks import ForkServer
from vector_task import write_vectors

from megadsl.config import Config
from megadsl.errors import UserError



@pytest.fixture(scope="module")
def server():
    with ForkServer() as started:
        yield started


@pytest.fixture(scope="module")
def vectors(tmp_path_factory) -> Path:
    return write_vectors(tmp_path_factory.mktemp("vectors") / "data")


def configured(small_data, vectors: Path, run_dir: Path, layout=REFERENCE, **sections: dict) -> Config:
    model = {"family": "encoder", "seq_length": 16, "num_layers": 4, **sections.pop("model", {})}
    return small_data.config(
        run_dir, model=model, task={"name": "vector_classification"}, data={"datasets": [str(vectors)]}, tokenizer={"model": "none"},
        parallel=parallel_section(layout), **sections)


@pytest.fixture(scope="module")
def reference(server, small_data, vectors, tmp_path_factory) -> Config:
    config = configured(small_data, vectors, tmp_path_factory.mktemp("vector runs") / "reference")
    said = server.run(1, train, config)[0]
    assert "vector_classification: 4 layers x 32" in said and "validation loss" in said and "| accuracy " in said and "padding" in said
    return config


@pytest.mark.parametrize("layout", [*LAYOUTS, (2, 2, 1, 1)], ids=str)
def test_trains_the_same_and_resumes_exactly_in_every_layout(server, small_data, vectors, reference, tmp_path, layout):
    config = configured(small_data, vectors, tmp_path / "run", layout, checkpoint={"save_interval": 10})
    expected = curve(reference)
    assert expected[-1][0] < 0.3 * expected[0][0]
    require_same_curve_and_exact_resumption(server, config, layout, expected)


def test_evaluates_the_same_on_any_number_of_processes(server, reference):
    run_dir, request = reference.training.run_dir, {"batch_tokens": 48}
    one = server.run(1, evaluated, run_dir, 1, request)[0]
    assert one["samples"] == 40 and one["accuracy"] > 0.9 and one["loss"] < 0.3
    require_same_on_two_processes(server, run_dir, request, one)


def test_the_plan_predicts_it(small_data, vectors, tmp_path, one_process):
    """12 layers, mean of six draws: forward within 10 %, gradient within 20 % at every sublayer; vanilla is not at unit variance."""
    from megadsl.monitor.at_init import measure_at_init
    from megadsl.tasks.planning import plan_for_run

    for scheme in ("dslm", "vanilla"):
        config = configured(small_data, vectors, tmp_path, model={"num_layers": 12, "hidden_size": 128}, scheme={"name": scheme})
        plan = plan_for_run(config)
        assert "input_projection" in plan.embedding.weight_std and "head_dense" not in plan.head.weight_std
        measured = measure_at_init(config, plan, 6)
        for predicted, found in zip([plan.embedding, *plan.sublayers], measured, strict=True):
            assert found.forward_variance == pytest.approx(predicted.forward_variance, rel=0.1)
            if scheme == "dslm":
                assert found.forward_variance == pytest.approx(1.0, rel=0.1)
                assert found.gradient_variance == pytest.approx(predicted.gradient_variance, rel=0.2)
        if scheme == "vanilla":
            assert max(point.forward_variance for point in measured) < 0.2


def test_what_does_not_fit_is_a_sentence(small_data, vectors, tmp_path):
    from megadsl.tasks.registry import task_of
    from megadsl.tasks.task import EvaluationRequest

    with pytest.raises(UserError, match="task.num_classes: .* greater than or equal to 2"):
        task_of(configured(small_data, vectors, tmp_path).model_copy(
            update={"task": type(small_data.config(tmp_path).task)(name="vector_classification", num_classes=1)}))
    task = task_of(configured(small_data, vectors, tmp_path))
    with pytest.raises(UserError, match="--max-tokens does not go with task.name vector_classification"):
        task.require_known(EvaluationRequest(max_tokens=3))
    with pytest.raises(UserError, match="There is no task 'vector_classificatoin' .* did you mean"):
        task_of(task.config.model_copy(update={"task": type(task.config.task)(name="vector_classificatoin")}))
