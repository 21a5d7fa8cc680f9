"""What a model puts out for every sample of a split, on as many ranks as there are."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from megadsl.data.progress_bar import progress
from megadsl.inference.load import TrainedModel
from megadsl.model.activations import Activations
from megadsl.parallel.groups import sum_over_data_ranks
from megadsl.tasks.task import Batch

if TYPE_CHECKING:
    from megadsl.tasks.task import Task
    from megadsl.tasks.text.samples import TextSamples


@torch.inference_mode()
def outputs_of(task: "Task", model: TrainedModel, samples: "TextSamples", batch_tokens: int, width: int,
               read: Callable[[Activations, Batch], torch.Tensor]) -> torch.Tensor:
    """`read` gives [b, width] of a batch's output; all samples' rows, [n, width] fp64 on the host; each rank gets all of them."""
    size = max(1, batch_tokens // task.positions_per_sample)
    found = torch.zeros(len(samples), width, dtype=torch.float64)
    mine = range(0, len(samples), size)[model.coordinate.data::model.topology.data]
    with progress("evaluating", len(mine), enabled=model.is_main) as advance:
        for start in mine:
            end = min(start + size, len(samples))
            batch = task.collate([samples[index] for index in range(start, end)])
            batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
            found[start:end] = read(model(batch), batch).double().cpu()
            advance(1)
    return sum_over_data_ranks(found.to(model.device)).cpu()
