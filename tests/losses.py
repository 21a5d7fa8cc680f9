"""The loss of one batch on one process, as a number to differentiate: every part's mean over the batch, added up."""

import torch

from megadsl.model.stack import SequentialModel


def mean_loss(stack: SequentialModel, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The loss of a stack of make_stack; `batch` may hold more than the model reads."""
    totals = stack.task.loss(stack(stack.definition.inputs_of(batch)), batch)
    return sum(total / count for total, count in zip(totals, stack.task.counts(batch), strict=True))
