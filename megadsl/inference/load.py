"""A checkpoint as a model to be run, whatever layout it was trained under: on one process, or on several under any launcher."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from megadsl.checkpoint.store import Checkpoint
from megadsl.checkpoint.weights import TensorReader
from megadsl.config import Config
from megadsl.config.load import parse_config
from megadsl.data.tokenizer import Tokenizer
from megadsl.errors import UserError
from megadsl.model.activations import Activations
from megadsl.model.definition import ModelDefinition
from megadsl.model.init import tag_of
from megadsl.model.precision import prepare_precision
from megadsl.model.stack import SequentialModel
from megadsl.parallel.device import prepare_device
from megadsl.parallel.groups import initialize_groups
from megadsl.parallel.launch import Launch
from megadsl.parallel.topology import Coordinate, Topology


@dataclass(frozen=True)
class TrainedModel:
    """A model in evaluation mode with what is needed to use it.

    Attributes:
        config: of the run, in the layout of this process.
        network: its layers, filled.
        tokenizer: None where its task has none.
        topology: tensor-parallel ranks share the model, data-parallel ranks may share the work.
    """

    config: Config
    definition: ModelDefinition
    network: SequentialModel
    tokenizer: Tokenizer | None
    device: torch.device
    topology: Topology = Topology(1, 1, 1)
    coordinate: Coordinate = Coordinate(0, 0, 0)

    def __call__(self, batch: dict[str, torch.Tensor]) -> Activations:
        """What the model puts out for a batch on its device."""
        return self.network(self.definition.inputs_of(batch))

    @property
    def is_main(self) -> bool:
        """Whether this process speaks for all."""
        return self.coordinate == Coordinate(0, 0, 0)


def inference_config(checkpoint: Checkpoint, precision: str | None = None, tensor_parallel: int = 1) -> Config:
    """The checkpoint's configuration for running its model: no pipeline, no recomputation, its own tokenizer."""
    values = checkpoint.config().model_dump()
    values["parallel"] = {"zero_stage": 1, "tensor_model_parallel_size": tensor_parallel}  # the layout of training does not matter
    values["training"]["recompute"] = False
    values["training"]["precision"] = precision or values["training"]["precision"]
    if checkpoint.tokenizer.is_file():
        values["tokenizer"]["model"] = str(checkpoint.tokenizer)
    return parse_config(values)


def load_model(checkpoint: Checkpoint, config: Config, define: Callable[[], ModelDefinition], device_name: str = "auto",
               launch: Launch | None = None) -> TrainedModel:
    """Build the model and fill it from the checkpoint's full tensors; each tensor-parallel rank reads its slices.

    Args:
        config: of `inference_config`.
        define: makes the model's definition; called once the process groups exist.
        launch: the processes that take part; None: this one alone.

    Raises:
        UserError: a tensor is missing, unexpected or of another shape.
    """
    launch = launch or Launch.alone()
    tensor = config.parallel.tensor_model_parallel_size
    topology = Topology(tensor, 1, launch.world_size // tensor)
    device = prepare_device(device_name, launch.local_rank)
    # Megatron's layers ask for process groups even when there is one process.
    initialize_groups(launch, topology, device)
    definition = define()
    network, coordinate = SequentialModel(definition.entries), topology.coordinate(launch.rank)
    prepare_precision(network, config.training.precision)
    _fill(network, checkpoint, coordinate, topology)
    tokenizer = Tokenizer.load(checkpoint.tokenizer) if checkpoint.tokenizer.is_file() else None
    return TrainedModel(config, definition, network.to(device).eval(), tokenizer, device, topology, coordinate)


@torch.no_grad()
def _fill(network: SequentialModel, checkpoint: Checkpoint, coordinate: Coordinate, topology: Topology) -> None:
    with TensorReader(checkpoint.path, checkpoint.manifest) as reader:
        left = set(reader.names("weights"))
        for name, parameter in network.canonical_parameters():
            if name not in left:
                raise UserError(f"{checkpoint.path} has no tensor {name}; the checkpoint is not complete or not of this model.")
            left.remove(name)
            tag, shape = tag_of(name, parameter), reader.shape("weights", name)
            if shape != tag.full_shape:
                raise UserError(f"{checkpoint.path}: {name} has shape {shape}, the model wants {tag.full_shape}.")
            parts = [reader.part("weights", name, index) for index in tag.slices(coordinate.tensor, topology.tensor)]
            parameter.copy_(torch.cat(parts))
    if left:
        raise UserError(f"{checkpoint.path} holds tensors that the model has not, for example {min(left)}.")
