"""A model as training and inference use it: its list of layers and the tensors of a batch that it reads."""

from dataclasses import dataclass

import torch

from megadsl.model.builder import ModelBuilder, TaskLayers
from megadsl.model.decoder import decoder_entries
from megadsl.model.encoder import encoder_entries
from megadsl.model.encoder_decoder import encoder_decoder_entries
from megadsl.model.stack import LayerEntry

_ENTRIES = {"decoder": decoder_entries, "encoder": encoder_entries, "encoder_decoder": encoder_decoder_entries}


@dataclass(frozen=True)
class ModelDefinition:
    """Everything but the weights.

    Attributes:
        entries: the ordered list of layers.
        inputs: names of the batch's tensors that the model reads, in the order in which a pipeline's loader gives them.
        targets: names of those that the loss reads, likewise.
        embedding: name of the entry behind which the plan's prediction for the embedding holds.
        role_factors: the plan's, on the optimizer's numbers by parameter role.
    """

    entries: list[LayerEntry]
    inputs: tuple[str, ...]
    targets: tuple[str, ...]
    embedding: str
    role_factors: dict[str, dict[str, float]]

    def inputs_of(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The part of a batch that the model reads; what a caller leaves out (no segments, say) is left out."""
        return {name: batch[name] for name in self.inputs if name in batch}

    def as_tuples(self, batch: dict[str, torch.Tensor]) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
        """(inputs, targets) as DeepSpeed's pipeline loads them."""
        return tuple(batch[name] for name in self.inputs), tuple(batch[name] for name in self.targets)


def define_model(builder: ModelBuilder, layers: TaskLayers, inputs: tuple[str, ...], targets: tuple[str, ...]) -> ModelDefinition:
    """The trunk of model.family with a task's layers around it."""
    entries = _ENTRIES[builder.model.family](builder, layers)
    return ModelDefinition(entries, inputs, targets, layers.inputs[-1].name, builder.plan.role_factors)
