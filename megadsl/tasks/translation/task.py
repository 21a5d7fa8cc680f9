"""`translation`: an encoder-decoder writes a text in another language; one vocabulary and one word table for both sides.

Shape letters: b micro-batch, s source tokens (its end included), t target tokens.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from megadsl.tasks.target_text.options import TargetTextOptions
from megadsl.tasks.target_text.task import TargetTextTask, target_statistics
from megadsl.tasks.task import Batch
from megadsl.tasks.translation.prepare import StoredParallel
from megadsl.theory.inputs import TokenStatistics

if TYPE_CHECKING:
    from megadsl.model.builder import ModelBuilder, TaskLayers


class Translation(TargetTextTask):
    """Batch: source_tokens, source_segments [b, s]; target_tokens, labels, loss_mask [b, t]."""

    name = "translation"
    Options = TargetTextOptions
    inputs = ("source_tokens", "source_segments", "target_tokens")

    def open_folder(self, folder: Path) -> StoredParallel:
        return StoredParallel(folder)

    def positions(self, lengths: np.ndarray) -> np.ndarray:
        return lengths + 1

    def source_length(self, sample: Batch) -> int:
        return len(sample["source"])

    def source(self, stored: StoredParallel, split: str, index: int, rng: np.random.RandomState | None) -> dict[str, np.ndarray]:
        return {"source": stored.source(split, index).astype(np.int64)}

    def collate_sources(self, samples: Sequence[Batch], positions: int) -> Batch:
        import torch

        tokens, segments = (torch.zeros(len(samples), positions, dtype=torch.long) for _ in range(2))
        for row, sample in enumerate(samples):
            end = len(sample["source"])
            tokens[row, :end], tokens[row, end] = sample["source"], self.tokenizer.eos
            segments[row, :end + 1] = 1
        return {"source_tokens": tokens, "source_segments": segments}

    def real_positions(self, batch: Batch) -> Batch:
        return {"encoder": batch["source_segments"] > 0, "decoder": batch["loss_mask"] > 0}

    @cached_property
    def _source_statistics(self) -> TokenStatistics:
        sources = [self.stored.source("train", index) for index in range(self.train_size)]
        return target_statistics(sources, self.tokenizer.vocab_size, self.tokenizer.eos)

    def input_statistics(self) -> TokenStatistics:
        return replace(self._source_statistics, target=self.target_statistics, label_smoothing=self.options.label_smoothing)

    def layers(self, builder: "ModelBuilder") -> "TaskLayers":
        from megadsl.model.builder import TaskLayers

        return TaskLayers(
            inputs=[builder.word_embedding("source_tokens", shared=True), builder.embedding_sum("encoder.embedding", self.model.seq_length)],
            target_inputs=[builder.target_words(), builder.embedding_sum("decoder.embedding", self.model.target_length)],
            head=[builder.logits()], context=("source_segments",), target_context=("target_tokens",),
        )

    def generate(self, model, prompt, max_new_tokens, sampling, num_samples, num_beams) -> list[str]:
        from megadsl.inference.seq2seq import generate_target

        return generate_target(model, prompt, max_new_tokens, sampling, num_samples, num_beams)
