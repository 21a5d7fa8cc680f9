"""The trained model that an export is about: built, in evaluation mode, with everything that is known of it."""

from dataclasses import dataclass, field
from pathlib import Path

import torch

from megadsl.config import Config
from megadsl.data.tokenizer import Tokenizer
from megadsl.model.definition import ModelDefinition
from megadsl.model.stack import SequentialModel
from megadsl.schemes.plan import SignalPlan


@dataclass(frozen=True)
class ExportSource:
    """A model to export.

    Attributes:
        network: on one process, all its layers.
        sample: real inputs to compare logits on, two rows (Task.export_sample).
        facts: what the card says of its training, by title.
    """

    config: Config
    plan: SignalPlan
    network: SequentialModel
    definition: ModelDefinition
    sample: dict[str, torch.Tensor]
    tokenizer: Tokenizer
    tokenizer_file: Path
    padded_vocab_size: int
    facts: dict[str, str] = field(default_factory=dict)

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        """Canonical name -> tensor."""
        return {name: parameter.detach() for name, parameter in self.network.canonical_parameters()}

    @torch.inference_mode()
    def logits(self, sample: dict[str, torch.Tensor]) -> torch.Tensor:
        """[b, s, vocabulary of the tokenizer] for a `sample`."""
        output = self.network(self.definition.inputs_of(sample))
        return output["logits"].transpose(0, 1)[..., :self.tokenizer.vocab_size]
