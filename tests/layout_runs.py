"""What the tests of every task do: train under a layout, resume, evaluate a checkpoint; functions that rank processes call by name."""

import contextlib
import io
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from ranks import ForkServer

from megadsl.checkpoint.manifest import read_manifest
from megadsl.checkpoint.store import open_checkpoint
from megadsl.config import Config

if TYPE_CHECKING:
    import torch

# (tensor, pipeline, data, ZeRO)
REFERENCE = (1, 1, 1, 0)
LAYOUTS = [(2, 1, 1, 1), (1, 2, 1, 1), (1, 1, 2, 3)]


def parallel_section(layout: tuple[int, int, int, int]) -> dict:
    tensor, pipeline, _, zero = layout
    return {"tensor_model_parallel_size": tensor, "pipeline_model_parallel_size": pipeline, "zero_stage": zero}


def train(config: Config) -> str:
    """Train; what was printed."""
    from megadsl.training.loop import train as run

    with contextlib.redirect_stdout(io.StringIO()) as said:
        run(config)
    return said.getvalue()


def weights(run_dir: str | Path) -> "dict[str, torch.Tensor]":
    """The weights of a run's last checkpoint by canonical name."""
    from safetensors.torch import load_file

    found = {}
    for file in (open_checkpoint(run_dir).path / "weights").glob("*.safetensors"):
        found |= load_file(file)
    return found


def curve(config: Config) -> list[tuple[float, float]]:
    """(loss, gradient norm) of every logged iteration."""
    rows = [json.loads(line) for line in (Path(config.training.run_dir) / "metrics.jsonl").read_text().splitlines()]
    return [(row["train/loss"], row["train/grad_norm"]) for row in rows if "train/loss" in row]


def require_same_curve_and_exact_resumption(server: ForkServer, config: Config, layout: tuple[int, int, int, int], expected: list) -> None:
    """Train `config`, which saves at half of its iterations, under a layout: the curve is `expected` to 1e-5, and what resumes from
    the first checkpoint ends with the same bytes."""
    world, last, half = layout[0] * layout[1] * layout[2], config.training.train_iters, config.checkpoint.save_interval
    server.run(world, train, config)
    for column in range(2):
        assert [row[column] for row in curve(config)] == pytest.approx([row[column] for row in expected], rel=1e-5)
    end = Path(config.training.run_dir) / "checkpoints" / f"iteration-{last:07}"
    straight = read_manifest(end).files
    shutil.rmtree(end)
    said = server.run(world, train, config)[0]
    assert f"resuming after iteration {half}" in said
    resumed = read_manifest(end).files
    assert {name: file.sha256 for name, file in resumed.items()} == {name: file.sha256 for name, file in straight.items()}


def evaluated(run_dir: str, tensor: int, request: dict) -> dict:
    """The results of a run's last checkpoint; `request`: fields of EvaluationRequest."""
    from megadsl.parallel.groups import destroy_groups
    from megadsl.parallel.launch import discover_launch
    from megadsl.tasks.task import EvaluationRequest
    from megadsl.tasks.trained import load_trained

    task, model = load_trained(open_checkpoint(run_dir), "cpu", tensor_parallel=tensor, launch=discover_launch())
    results = task.evaluate(model, EvaluationRequest(**request))
    destroy_groups()
    return results


def require_same_on_two_processes(server: ForkServer, run_dir: str, request: dict, one: dict) -> None:
    """On two data-parallel processes and on two that share the model the results are those of one."""
    for world, tensor in ((2, 1), (2, 2)):
        for results in server.run(world, evaluated, run_dir, tensor, request):
            assert results == pytest.approx(one, rel=1e-6)


def require_same_hypotheses(server: ForkServer, run_dir: str, request: dict, folder: Path) -> tuple[dict, list[dict]]:
    """Numbers and hypotheses of one process are those of two data-parallel ones and of two that share the model: (results, what was
    written of every sample)."""
    def at(world: int, tensor: int) -> tuple[list[dict], list[dict]]:
        file = folder / f"{world}-{tensor}.jsonl"
        results = server.run(world, evaluated, run_dir, tensor, {**request, "hypotheses": file})
        return results, [json.loads(line) for line in file.read_text().splitlines()]

    [one], written = at(1, 1)
    numbers = {name: value for name, value in one.items() if not isinstance(value, str)}
    for world, tensor in ((2, 1), (2, 2)):
        others, again = at(world, tensor)
        for results in others:
            assert {name: results[name] for name in numbers} == pytest.approx(numbers, rel=1e-5)
        assert [row["hypothesis"] for row in again] == [row["hypothesis"] for row in written]
    return one, written
