"""Sums of a task's loss and metrics over samples, on as many ranks as there are: each data-parallel rank takes every so manieth
batch, so that the numbers do not depend on how many take part."""

from collections.abc import Callable, Sequence, Sized
from typing import TYPE_CHECKING

import torch

from megadsl.data.progress_bar import progress
from megadsl.inference.load import TrainedModel
from megadsl.model.activations import Activations
from megadsl.parallel.groups import sum_over_data_ranks
from megadsl.tasks.task import Batch, EvaluationRequest, Sum

if TYPE_CHECKING:
    from megadsl.tasks.task import Task


@torch.inference_mode()
def add_up(task: "Task", model: TrainedModel, samples: Sized, request: EvaluationRequest,
           measure: Callable[[Activations, Batch, Sequence[float]], torch.Tensor], shape: tuple[int, ...],
           title: str = "evaluating") -> torch.Tensor:
    """What `measure` makes of every batch (its output, the batch on the device, the task's counts), of `shape`, added up in fp64 over
    all of `samples` and all ranks; on all ranks together, each gets the result on the CPU."""
    size = max(1, request.batch_tokens // task.positions_per_sample)
    starts = range(0, len(samples), size)
    mine, total = starts[model.coordinate.data::model.topology.data], torch.zeros(shape, dtype=torch.float64)
    with progress(title, len(mine), enabled=model.is_main) as advance:
        for start in mine:
            batch = task.collate([samples[index] for index in range(start, min(start + size, len(samples)))])
            counts = task.counts(batch)
            batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
            total += measure(model(batch), batch, counts).double().cpu()
            advance(1)
    return sum_over_data_ranks(total.to(model.device)).cpu()


def evaluation_sums(task: "Task", model: TrainedModel, samples: Sized, request: EvaluationRequest) -> dict[str, Sum]:
    """Sums by name of loss part and metric over all of `samples`; on all ranks together, each gets the result."""
    names = [part.name for part in task.loss_parts] + list(task.metric_names)

    def measure(output: Activations, batch: Batch, counts: Sequence[float]) -> torch.Tensor:
        sums = [Sum(total, count) for total, count in zip(task.loss(output, batch), counts, strict=True)]
        sums += task.metrics(output, batch)
        return torch.tensor([[float(total), float(count)] for total, count in sums], dtype=torch.float64)

    totals = add_up(task, model, samples, request, measure, (len(names), 2))
    return {name: Sum(*row) for name, row in zip(names, totals.tolist(), strict=True)}


def mean_results(task: "Task", model: TrainedModel, samples: Sized, request: EvaluationRequest) -> dict[str, float | int | None]:
    """The means by name, "loss" (the sum of its parts' means), and how many samples there were."""
    sums = evaluation_sums(task, model, samples, request)
    means = {name: total / count if count else None for name, (total, count) in sums.items()}
    loss = sum(means[part.name] or 0.0 for part in task.loss_parts)
    return {"loss": loss, **means, "samples": len(samples)}
