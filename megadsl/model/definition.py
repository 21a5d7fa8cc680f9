"""A model as training and inference use it: its list of layers, the tensors of a batch that it reads, and its loss."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from megadsl.config import Config
from megadsl.data.keys import batch_keys
from megadsl.model.builder import ModelBuilder
from megadsl.model.decoder import decoder_entries
from megadsl.model.encoder import encoder_entries
from megadsl.model.encoder_decoder import encoder_decoder_entries
from megadsl.model.loss import language_model_loss, masked_and_order_loss
from megadsl.model.stack import LayerEntry
from megadsl.schemes.plan import SignalPlan

_ENTRIES = {"decoder": decoder_entries, "encoder": encoder_entries, "encoder_decoder": encoder_decoder_entries}
_TARGETS = ("labels", "loss_mask", "sentence_order")


@dataclass(frozen=True)
class ModelDefinition:
    """Everything but the weights.

    Attributes:
        entries: the ordered list of layers.
        inputs: names of the batch's tensors that go into the first entry, in order.
        targets: names of those that the loss wants.
        loss: (output of the last entry, targets) -> mean loss of a micro-batch.
        role_factors: the plan's, on the optimizer's numbers by parameter role.
    """

    entries: list[LayerEntry]
    inputs: tuple[str, ...]
    targets: tuple[str, ...]
    loss: Callable
    role_factors: dict[str, dict[str, float]]

    def split(self, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor | tuple, tuple]:
        """(inputs, targets) of a batch; a single input is a tensor, several are a tuple."""
        inputs = tuple(batch[name] for name in self.inputs)
        return inputs[0] if len(inputs) == 1 else inputs, tuple(batch[name] for name in self.targets)


def define_model(config: Config, plan: SignalPlan, padded_vocab_size: int) -> ModelDefinition:
    """The model of a configuration under a plan."""
    keys = batch_keys(config)
    inputs = tuple(key for key in keys if key not in _TARGETS)
    targets = tuple(key for key in keys if key in _TARGETS)
    entries = _ENTRIES[config.model.family](ModelBuilder(config, plan, padded_vocab_size), inputs[1:])
    loss = masked_and_order_loss if "sentence_order" in targets else language_model_loss
    return ModelDefinition(entries, inputs, targets, loss, plan.role_factors)
