"""The model of a checkpoint with its task: what evaluate, generate and export start from."""

from megadsl.checkpoint.store import Checkpoint
from megadsl.config import Config
from megadsl.inference.load import TrainedModel, inference_config, load_model
from megadsl.model.stack import LayerEntry
from megadsl.parallel.launch import Launch
from megadsl.tasks.registry import task_of
from megadsl.tasks.task import Task


def load_trained(checkpoint: Checkpoint, device: str = "auto", precision: str | None = None, tensor_parallel: int = 1,
                 launch: Launch | None = None) -> tuple[Task, TrainedModel]:
    """(task, model); on all processes of `launch` together (None: this one alone). `precision` None: that of training.

    Raises:
        UserError: the checkpoint does not fit its own configuration.
    """
    config = inference_config(checkpoint, precision, tensor_parallel)
    task = _task_of(checkpoint, config)
    model = load_model(
        checkpoint, config, lambda: task.define_model(checkpoint.plan(), checkpoint.info.padded_vocab_size), device, launch)
    return task, model


def entries_of_checkpoint(checkpoint: Checkpoint, config: Config) -> list[LayerEntry]:
    """The list of layers of a checkpoint's model under its configuration in another layout."""
    return _task_of(checkpoint, config).define_model(checkpoint.plan(), checkpoint.info.padded_vocab_size).entries


def _task_of(checkpoint: Checkpoint, config: Config) -> Task:
    task = task_of(config)
    task.saved = checkpoint.path
    return task
