"""`speech_translation`: an encoder-decoder writes the translation (or the transcript) of an utterance.

The encoder reads positions that a front end makes of 4 frames of 10 ms each (layers.py); the decoder has a word table of its own.
Shape letters: b micro-batch, n frames, s positions, t target tokens.
"""

from collections.abc import Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from pydantic import Field

from megadsl.tasks.speech.augment import SpecAugment
from megadsl.tasks.speech.features import NUM_BINS
from megadsl.tasks.speech.prepare import StoredSpeech
from megadsl.tasks.speech.statistics import STRIDE, FrontEnd, front_end_moments
from megadsl.tasks.target_text.options import TargetTextOptions
from megadsl.tasks.target_text.task import TargetTextTask
from megadsl.tasks.task import Batch
from megadsl.theory.inputs import TokenStatistics

if TYPE_CHECKING:
    from megadsl.model.builder import ModelBuilder, TaskLayers

# Utterances that the front end's moments are measured on.
_MEASURED = 24


class SpeechOptions(TargetTextOptions):
    """Options of speech_translation."""

    front_end: Literal["convolution", "stacking"] = Field(
        "convolution", description="what makes a position of 4 frames: two convolutions of width 5 and stride 2 with a ReLU between, or one matrix"
    )
    conv_channels: int = Field(256, ge=1, description="channels between the two convolutions")
    frequency_masks: int = Field(1, ge=0, description="SpecAugment: bands of mel bins that are blanked in training")
    frequency_mask_width: int = Field(27, ge=0, le=NUM_BINS, description="widest such band, in bins")
    time_masks: int = Field(1, ge=0, description="SpecAugment: stretches of time that are blanked in training")
    time_mask_width: int = Field(100, ge=0, description="longest such stretch, in frames")
    time_mask_share: float = Field(1.0, ge=0, le=1, description="longest such stretch, as a share of the utterance")


class SpeechTranslation(TargetTextTask):
    """Batch: frames [b, n, 80] fp32, frame_counts [b]; target_tokens, labels, loss_mask [b, t]."""

    name = "speech_translation"
    Options = SpeechOptions
    options: SpeechOptions
    inputs = ("frames", "frame_counts", "target_tokens")

    def open_folder(self, folder: Path) -> StoredSpeech:
        return StoredSpeech(folder)

    def positions(self, lengths: np.ndarray) -> np.ndarray:
        return -(-lengths // STRIDE)

    def source_length(self, sample: Batch) -> int:
        return len(sample["frames"])

    @cached_property
    def _augment(self) -> SpecAugment:
        options = self.options
        return SpecAugment(options.frequency_masks, options.frequency_mask_width, options.time_masks, options.time_mask_width,
                           options.time_mask_share)

    def source(self, stored: StoredSpeech, split: str, index: int, rng: np.random.RandomState | None) -> dict[str, np.ndarray]:
        frames = stored.features(split, index).astype(np.float32)
        return {"frames": frames if rng is None else self._augment(frames, rng)}

    def collate_sources(self, samples: Sequence[Batch], positions: int) -> Batch:
        import torch

        counts = torch.tensor([len(sample["frames"]) for sample in samples])
        frames = torch.zeros(len(samples), STRIDE * positions, NUM_BINS)
        for row, sample in enumerate(samples):
            frames[row, :counts[row]] = sample["frames"]
        return {"frames": frames, "frame_counts": counts}

    def real_positions(self, batch: Batch) -> Batch:
        import torch

        counts = -(-batch["frame_counts"] // STRIDE)
        positions = batch["frames"].size(1) // STRIDE
        return {"encoder": torch.arange(positions, device=counts.device) < counts[:, None], "decoder": batch["loss_mask"] > 0}

    @cached_property
    def _front_end(self) -> FrontEnd:
        """The front end's moments on training samples, SpecAugment included."""
        train = self.splits(_MEASURED).train
        step = max(1, train.samples_per_epoch // _MEASURED)
        count = min(_MEASURED, train.samples_per_epoch)
        frames = [train.arrays(index * step)["frames"] for index in range(count)]
        return front_end_moments(frames, self.options.front_end, self.options.conv_channels)

    def input_statistics(self) -> TokenStatistics:
        target, found, stored = self.target_statistics, self._front_end, self.stored
        lengths = self.positions(stored.source_lengths("train"))[:self.train_size]
        return TokenStatistics(
            target.vocab_size, found.overlap, num_tokens=int(lengths.sum()), projected_size=found.size,
            projected_second_moment=found.second_moment, inner_projection_std=found.inner_std, length=float(lengths.mean()), spread=found.spread,
            target=target, label_smoothing=self.options.label_smoothing,
        )

    def describe_inputs(self) -> str:
        found, target = self._front_end, self.target_statistics
        return (f"overlap of positions {found.overlap:.4f} ({found.utterances} utterances, {self.options.front_end}); targets: vocabulary "
                f"{target.vocab_size}, repeat probability {target.repeats:.4f} ({target.num_tokens:,} tokens)")

    def layers(self, builder: "ModelBuilder") -> "TaskLayers":
        from megadsl.model.builder import TaskLayers
        from megadsl.model.stack import LayerEntry
        from megadsl.tasks.speech.layers import Convolutions, StackedFrames

        stds, core = builder.plan.embedding.weight_std, builder.core
        if self.options.front_end == "convolution":
            front = partial(Convolutions, core.hidden_size, core.params_dtype, self.options.conv_channels, stds["inner_projection"], stds["input_projection"])
        else:
            front = partial(StackedFrames, core.hidden_size, core.params_dtype, stds["input_projection"])
        return TaskLayers(
            inputs=[LayerEntry("encoder.front_end", front), builder.embedding_sum("encoder.embedding", self.model.seq_length)],
            target_inputs=[builder.target_embedding(), builder.embedding_sum("decoder.embedding", self.model.target_length)],
            head=[builder.logits()], context=("source_segments",), target_context=("target_tokens",),
        )
