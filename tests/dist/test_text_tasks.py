"""Text classification, multiple choice and span questions: the same losses in every layout, exact resuming, evaluation on any ranks."""

from pathlib import Path

import pytest
from layout_runs import (
    LAYOUTS, REFERENCE, curve, evaluated, parallel_section, require_same_curve_and_exact_resumption, require_same_on_two_processes, train,
    weights,
)
from ranks import ForkServer
from text_data import KINDS, make

from megadsl.config import Config



@pytest.fixture(scope="module")
def server():
    with ForkServer() as started:
        yield started


@pytest.fixture(scope="module")
def folders(small_data, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("texts")
    return {name: make(name, folder / name, small_data.tokenizer) for name in KINDS}


def configured(small_data, data: Path, task: str, run_dir: Path, layout=REFERENCE, **sections: dict) -> Config:
    options = {"question_answering": {"doc_stride": 12, "max_query_length": 8}}.get(task, {})
    model = {"family": "encoder", "num_layers": 4, "num_tokentypes": 2, **sections.pop("model", {})}
    return small_data.config(
        run_dir, model=model, task={"name": task, **options}, data={"datasets": [str(data)]}, optimizer={"lr": 5e-4, "adam_eps": 1e-6}, training={"train_iters": 12},
        parallel=parallel_section(layout), **sections)


@pytest.fixture(scope="module")
def references(server, small_data, folders, tmp_path_factory) -> dict[str, Config]:
    runs = tmp_path_factory.mktemp("text runs")
    configs = {name: configured(small_data, folders[name], name, runs / name) for name in KINDS}
    for name, config in configs.items():
        said = server.run(1, train, config)[0]
        assert f"{name}: 4 layers x 32" in said and "validation loss" in said and "padding" in said
    return configs


@pytest.mark.parametrize("task", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_trains_the_same_and_resumes_exactly_in_every_layout(server, small_data, folders, references, tmp_path, task, layout):
    config = configured(small_data, folders[task], task, tmp_path / "run", layout, checkpoint={"save_interval": 6})
    expected = curve(references[task])
    assert len(expected) == 12 and sum(loss for loss, _ in expected[-5:]) < sum(loss for loss, _ in expected[:5])
    require_same_curve_and_exact_resumption(server, config, layout, expected)


@pytest.mark.parametrize("task", KINDS)
def test_evaluates_the_same_on_any_number_of_processes(server, references, task):
    run_dir, request = references[task].training.run_dir, {"split": "validation", "batch_tokens": 256}
    one = server.run(1, evaluated, run_dir, 1, request)[0]
    assert one[{"question_answering": "questions"}.get(task, "samples")] == {"text_classification": 30, "multiple_choice": 18}.get(task, 14)
    require_same_on_two_processes(server, run_dir, request, one)


def exported(run_dir: str, folder: Path) -> tuple[str, float]:
    from megadsl.checkpoint.store import open_checkpoint
    from megadsl.tasks.export import export_of_task

    return export_of_task(open_checkpoint(run_dir), folder)


@pytest.mark.parametrize("norm_position", ["pre", "post"])
@pytest.mark.parametrize("task", KINDS)
def test_transformers_gives_the_same_logits(server, small_data, folders, references, tmp_path, task, norm_position):
    config = references[task]
    if norm_position == "post":
        config = configured(small_data, folders[task], task, tmp_path / "run", model={"norm_position": "post", "embedding_layernorm": True})
        server.run(1, train, config)
    name, error = server.run(1, exported, config.training.run_dir, tmp_path / "hf")[0]
    kind = {"text_classification": "SequenceClassification", "multiple_choice": "MultipleChoice", "question_answering": "QuestionAnswering"}[task]
    assert name == ("Bert" if norm_position == "post" else "MegatronBert") + "For" + kind and error < 1e-4
    assert {"config.json", "model.safetensors", "tokenizer.model"} <= {path.name for path in (tmp_path / "hf").iterdir()}


@pytest.mark.parametrize("layout", [REFERENCE, (2, 1, 1, 1), (1, 1, 2, 3)], ids=str)
def test_frozen_layers_stay_and_the_others_learn_by_their_depth(server, small_data, folders, references, tmp_path, layout):
    """From a trained run: embedding and two layers as they were, bit for bit; a step of the others in the ratio of their rates."""
    trunk = references["text_classification"].training.run_dir
    # Adam's first step is lr x sign of the gradient, where eps is nothing beside it.
    config = configured(
        small_data, folders["text_classification"], "text_classification", tmp_path / "run", layout, checkpoint={"init_from": trunk})
    config = config.model_copy(update={
        "optimizer": config.optimizer.model_copy(update={
            "lr": 1e-3, "layer_lr_decay": 0.5, "weight_decay": 0.0, "lr_warmup_iters": 0, "adam_eps": 1e-20, "lr_decay_style": "constant"}),
        "training": config.training.model_copy(update={"train_iters": 1, "freeze_layers": 2})})
    said = next(filter(None, server.run(layout[0] * layout[1] * layout[2], train, config)))
    assert "tensors taken" in said and "stands still" not in said

    before, after = weights(trunk), weights(tmp_path / "run")
    moved = {name: (after[name] - before[name]).abs().median().item() for name in before}
    frozen = {name for name in before if name.startswith(("embedding", "encoder.0.", "encoder.1."))}
    assert frozen and all(moved[name] == 0.0 for name in frozen)
    for prefix, factor in (("encoder.2.mlp.linear_fc1.weight", 0.25), ("encoder.3.mlp.linear_fc1.weight", 0.5), ("classifier.linear.weight", 1.0)):
        assert moved[prefix] == pytest.approx(1e-3 * factor, rel=1e-2)
