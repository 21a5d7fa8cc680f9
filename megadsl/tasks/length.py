"""How long a run is: training.train_epochs and optimizer.lr_warmup_fraction become iterations here, and nowhere else. Without torch."""

import math

from megadsl.config import Config
from megadsl.errors import UserError


def with_length(config: Config, samples_per_epoch: int | None) -> Config:
    """The configuration with train_iters and lr_warmup_iters worked out; as it is where nothing asks for it or the data are not there.

    The last epoch is rounded up to a whole global batch.
    """
    training, optimizer = config.training, config.optimizer
    if training.train_epochs is not None and samples_per_epoch is not None:
        iterations = math.ceil(training.train_epochs * samples_per_epoch / training.global_batch_size)
        training = training.model_copy(update={"train_iters": max(1, iterations)})
    if optimizer.lr_warmup_fraction is not None:
        warmup = round(optimizer.lr_warmup_fraction * training.train_iters)
        optimizer = optimizer.model_copy(update={"lr_warmup_iters": warmup})
    return config.model_copy(update={"training": training, "optimizer": optimizer})


def require_length(config: Config, samples_per_epoch: int | None, task: str) -> None:
    """UserError where epochs cannot be counted in, or were not worked out."""
    if config.training.train_epochs is not None and samples_per_epoch is None:
        raise UserError(f"training.train_epochs does not go with task.name {task}, whose data are no list of samples; set training.train_iters.")
    if with_length(config, samples_per_epoch) != config:
        raise UserError("training.train_epochs or optimizer.lr_warmup_fraction is not worked out; pass the configuration through megadsl.tasks.registry.resolved.")
