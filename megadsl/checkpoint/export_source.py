"""The trained model that an export is about: built, in evaluation mode, with everything that is known of it."""

import os
from dataclasses import dataclass, field
from pathlib import Path

import torch

from megadsl.config import Config
from megadsl.data.tokenizer import Tokenizer
from megadsl.model.stack import SequentialModel
from megadsl.model.stream import hidden_of
from megadsl.schemes.plan import SignalPlan

VERIFIED_TOKENS = 256


@dataclass(frozen=True)
class ExportSource:
    """A model to export.

    Attributes:
        stack: on one process, all its layers.
        inputs: names of the tensors that it reads (ModelDefinition.inputs).
        facts: what the card says of its training, by title.
    """

    config: Config
    plan: SignalPlan
    stack: SequentialModel
    inputs: tuple[str, ...]
    tokenizer: Tokenizer
    tokenizer_file: Path
    padded_vocab_size: int
    facts: dict[str, str] = field(default_factory=dict)

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        """Canonical name -> tensor."""
        return {name: parameter.detach() for name, parameter in self.stack.canonical_parameters()}

    def sample(self) -> dict[str, torch.Tensor]:
        """Real text to compare logits on, two rows of at most VERIFIED_TOKENS: tokens [2, s], or source_tokens [2, s],
        source_segments [2, s] (the second row is padded) and target_tokens [2, t]."""
        model = self.config.model
        text = Path(os.__file__).read_text(encoding="utf-8")  # the standard library's: every machine has it
        ids = torch.tensor(self.tokenizer.encode(text[:40 * VERIFIED_TOKENS]))

        def rows(length: int, start: int) -> torch.Tensor:
            length = min(length, VERIFIED_TOKENS, (len(ids) - start) // 2)
            return ids[start:start + 2 * length].view(2, length).clone()

        tokens = rows(model.seq_length, 0)
        if model.family == "encoder":
            tokens[:, 3::7] = self.tokenizer.special_ids.get("mask", 0)
        if model.family != "encoder_decoder":
            return {"tokens": tokens}
        segments = torch.ones_like(tokens)
        if "source_segments" in self.inputs:
            segments[1, tokens.size(1) // 2:] = 0
        return {"source_tokens": tokens, "source_segments": segments, "target_tokens": rows(model.target_length, 7)}

    @torch.inference_mode()
    def logits(self, sample: dict[str, torch.Tensor]) -> torch.Tensor:
        """[b, s, vocabulary of the tokenizer] for a `sample`."""
        inputs = tuple(sample[name] for name in self.inputs if name in sample)
        output = self.stack(inputs[0] if len(inputs) == 1 else inputs)
        return hidden_of(output).transpose(0, 1)[..., :self.tokenizer.vocab_size]
