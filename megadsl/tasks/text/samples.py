"""Samples of a prepared split: sequences of token ids, a few of them side by side in multiple choice, with their targets.

Shape letters: k sequences of a sample, n tokens of the longest of them.
"""

from collections.abc import Callable

import numpy as np
import torch

from megadsl.data.epoch_order import EpochOrder
from megadsl.tasks.text.sequences import Sequence

Targets = dict[str, np.ndarray]


class TextSamples(torch.utils.data.Dataset):
    """Samples by number: {"tokens": [k, n], "types": [k, n], "lengths": [k], targets ...}.

    The training split (`seed` given) never ends: sample i is number i mod rows of a permutation that every epoch has of its own. Other
    splits stand in their order; behind their end come samples without a label, which do not count.

    Args:
        make: number of a row -> (its sequences, its targets).
        unlabelled: the targets of a sample that does not count.
    """

    def __init__(self, rows: int, make: Callable[[int], tuple[list[Sequence], Targets]], unlabelled: Targets, seed: int | None):
        self.samples_per_epoch, self._make, self._unlabelled = rows, make, unlabelled
        self._order = None if seed is None else EpochOrder(rows, seed)

    def __len__(self) -> int:
        return self.samples_per_epoch if self._order is None else 2**40

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        index, rows = int(index), self.samples_per_epoch
        sequences, targets = self._make(index % rows if self._order is None else self._order[index])
        if self._order is None and index >= rows:
            targets = self._unlabelled
        longest = max(len(sequence.tokens) for sequence in sequences)
        padded = np.zeros((2, len(sequences), longest), dtype=np.int64)
        for row, sequence in enumerate(sequences):
            padded[0, row, :len(sequence.tokens)], padded[1, row, :len(sequence.types)] = sequence.tokens, sequence.types
        lengths = torch.tensor([len(sequence.tokens) for sequence in sequences])
        return {"tokens": torch.from_numpy(padded[0]), "types": torch.from_numpy(padded[1]), "lengths": lengths,
                **{name: torch.as_tensor(target) for name, target in targets.items()}}


def padded(samples: list[dict[str, torch.Tensor]], length: int, pad: int, num_types: int) -> dict[str, torch.Tensor]:
    """tokens, segments (0: padding) and token types [b * k, length] of samples of k sequences each."""
    lengths = torch.cat([sample["lengths"] for sample in samples])
    segments = (torch.arange(length) < lengths[:, None]).long()

    def rows(name: str, fill: int) -> torch.Tensor:
        found = [torch.nn.functional.pad(sample[name], (0, length - sample[name].size(1)), value=fill) for sample in samples]
        return torch.cat(found)

    batch = {"tokens": torch.where(segments > 0, rows("tokens", pad), pad), "segments": segments}
    return batch | ({"tokentypes": rows("types", 0).clamp(max=num_types - 1)} if num_types else {})
