"""The loss is a sum by a count over the global batch, so it does not matter how the batch is cut: micro-batches of 1, 2 and 4, one and
two data ranks, one and two stages give one loss, one gradient norm and, after ten steps, one set of weights.

The samples count unequally: prefixes of random length, whole words, padded sources, sequences without a label.
"""

import json
from pathlib import Path

import pytest
import torch
from ranks import ForkServer
from safetensors.torch import load_file
from vector_task import write_vectors

from megadsl.config import Config

# (micro-batch, pipeline, data)
REFERENCE = (8, 1, 1)
CUTS = [(1, 1, 1), (2, 1, 1), (4, 1, 1), (1, 1, 2), (4, 1, 2), (1, 2, 1), (4, 2, 1)]
TASKS = {
    "prefix": {"task": {"prefix_lm": True}},
    "masked": {"model": {"family": "encoder", "num_tokentypes": 2}, "task": {"sentence_order": True, "masking_do_full_word": True}},
    "infilling": {"model": {"family": "encoder_decoder", "num_layers": 2}, "task": {"corruption": "infilling"}},
    "vectors": {"model": {"family": "encoder", "seq_length": 16}, "task": {"name": "vector_classification"}},
}
TOLERANCE = 1e-5


def train(config: Config) -> None:
    from megadsl.training.loop import train as run

    run(config)


def found(run_dir: Path) -> tuple[list[float], list[float], float, dict[str, torch.Tensor]]:
    """(losses, gradient norms, validation loss, weights) of a run."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "train/loss" in row]
    weights = {}
    for file in (run_dir / "checkpoints" / "iteration-0000010" / "weights").glob("*.safetensors"):
        weights |= load_file(file)
    validation = next(row["validation/loss"] for row in rows if "validation/loss" in row)
    return [row["train/loss"] for row in steps], [row["train/grad_norm"] for row in steps], validation, weights


@pytest.fixture(scope="module")
def runs(small_data, tmp_path_factory):
    folder, results = tmp_path_factory.mktemp("cuts"), {}
    vectors = write_vectors(folder / "data")
    with ForkServer() as server:
        for name, sections in TASKS.items():
            for micro, pipeline, data in (REFERENCE, *CUTS):
                sections = dict(sections)
                if name == "vectors":
                    sections["data"] = {"datasets": [str(vectors)]}
                config = small_data.config(
                    folder / name / f"{micro}-{pipeline}-{data}", **{**sections, "model": {"num_layers": 3, **sections.get("model", {})}},
                    parallel={"pipeline_model_parallel_size": pipeline, "zero_stage": 1},
                    training={"micro_batch_size": micro, "train_iters": 10},
                    # Without momentum's first huge steps, whose size is the sign of rounding where a gradient is nothing but that.
                    optimizer={"lr": 1e-3, "adam_eps": 1e-4},
                )
                server.run(pipeline * data, train, config)
                results[name, micro, pipeline, data] = found(Path(config.training.run_dir))
    return results


@pytest.mark.parametrize("name", TASKS)
def test_any_cut_of_a_global_batch_gives_the_same_step(runs, name):
    losses, norms, validation, weights = runs[(name, *REFERENCE)]
    assert len(losses) == 10 and losses[-1] < losses[0]
    for cut in CUTS:
        other_losses, other_norms, other_validation, other_weights = runs[(name, *cut)]
        assert other_losses == pytest.approx(losses, rel=TOLERANCE), cut
        assert other_norms == pytest.approx(norms, rel=TOLERANCE), cut
        assert other_validation == pytest.approx(validation, rel=TOLERANCE), cut
        assert other_weights.keys() == weights.keys()
        for parameter, tensor in weights.items():
            assert (other_weights[parameter] - tensor).norm() <= TOLERANCE * max(1.0, tensor.norm()), (cut, parameter)


def test_counts_are_unequal_or_the_test_says_nothing(small_data, tmp_path):
    """The mean of means, which is what must not be computed, differs by far more than the tolerance."""
    from megadsl.tasks.registry import task_of

    task = task_of(small_data.config(tmp_path, **TASKS["prefix"]))
    counts = [task.counts(task.collate([task.splits(8).train[index]]))[0] for index in range(8)]
    assert max(counts) > 3 * min(counts)


def bf16_norms(config: Config) -> list[float]:
    train(config)
    rows = [json.loads(line) for line in (Path(config.training.run_dir) / "metrics.jsonl").read_text().splitlines()]
    return [row["train/grad_norm"] for row in rows if "train/grad_norm" in row]


@pytest.mark.parametrize("zero, pipeline, data", [(1, 1, 1), (2, 1, 2), (3, 1, 2), (1, 2, 1)])
def test_bf16_adds_up_64_micro_batches_in_fp32(small_data, tmp_path, zero, pipeline, data):
    """The gradient norm of 64 micro-batches of one sample is that of fp32; added up in bf16 it would be off by more than 1 %."""
    def config(name: str, micro: int, **changes: dict) -> Config:
        training = {"micro_batch_size": micro, "global_batch_size": 64, "train_iters": 1, "eval_iters": 0, "precision": "bf16"}
        return small_data.config(
            tmp_path / name, model={"num_layers": 2}, training={**training, **changes.pop("training", {})}, optimizer={"clip_grad": 0.0},
            **changes)

    with ForkServer() as server:
        exact = server.run(1, bf16_norms, config("fp32", 32, training={"precision": "fp32"}))[0]
        many = server.run(pipeline * data, bf16_norms, config(
            "many", 1, parallel={"zero_stage": zero, "pipeline_model_parallel_size": pipeline}))[0]
    assert many == pytest.approx(exact, rel=2e-3)
