"""A checkpoint as a model on one process, whatever layout it was trained under."""

from dataclasses import dataclass

import torch

from megadsl.checkpoint.store import Checkpoint
from megadsl.checkpoint.weights import read_weights
from megadsl.config import Config
from megadsl.config.load import parse_config
from megadsl.data.tokenizer import Tokenizer
from megadsl.errors import UserError
from megadsl.model.definition import ModelDefinition, define_model
from megadsl.model.stack import SequentialModel
from megadsl.parallel.device import prepare_device
from megadsl.parallel.groups import initialize_groups
from megadsl.parallel.launch import Launch
from megadsl.parallel.topology import Topology


@dataclass(frozen=True)
class TrainedModel:
    """A model in evaluation mode with what is needed to use it."""

    config: Config
    definition: ModelDefinition
    stack: SequentialModel
    tokenizer: Tokenizer
    device: torch.device


def load_model(checkpoint: Checkpoint, device_name: str = "auto", precision: str | None = None) -> TrainedModel:
    """Build the model on this process and fill it from the checkpoint's full tensors; `precision` None: that of training.

    Raises:
        UserError: a tensor is missing, unexpected or of another shape.
    """
    values = checkpoint.config().model_dump()
    values["parallel"] = {"zero_stage": 1}  # the layout of training does not matter here
    values["training"]["recompute"] = False
    values["training"]["precision"] = precision or values["training"]["precision"]
    config = parse_config(values)
    device = prepare_device(device_name)
    # Megatron's layers ask for process groups even when there is one process; its address is free for the taking.
    initialize_groups(Launch.alone(), Topology(1, 1, 1), device)
    definition = define_model(config, checkpoint.plan(), checkpoint.info.padded_vocab_size)
    stack = SequentialModel(definition.entries, definition.loss)
    _fill(stack, checkpoint)
    return TrainedModel(config, definition, stack.to(device).eval(), Tokenizer.load(checkpoint.tokenizer), device)


@torch.no_grad()
def _fill(stack: SequentialModel, checkpoint: Checkpoint) -> None:
    tensors = dict(read_weights(checkpoint.path))
    for name, parameter in stack.canonical_parameters():
        if name not in tensors:
            raise UserError(f"{checkpoint.path} has no tensor {name}; the checkpoint is not complete or not of this model.")
        tensor = tensors.pop(name)
        if tensor.shape != parameter.shape:
            raise UserError(
                f"{checkpoint.path}: {name} has shape {tuple(tensor.shape)}, the model wants {tuple(parameter.shape)}."
            )
        parameter.copy_(tensor)
    if tensors:
        raise UserError(f"{checkpoint.path} holds tensors that the model has not, for example {next(iter(tensors))}.")
