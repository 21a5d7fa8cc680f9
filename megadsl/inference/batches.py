"""A stream of tokens cut into samples of the model's own objective, for evaluation: the same samples for every model of one
shape, because they are seeded by their number. Shape letters: b batch."""

from collections.abc import Iterator

import numpy as np
import torch

from megadsl.data.lengths import raw_window
from megadsl.data.objective import objective_of
from megadsl.errors import UserError
from megadsl.inference.load import TrainedModel

_SEED = 20240309  # any number, the same for all evaluations


def objective_batches(model: TrainedModel, tokens: np.ndarray, batch_size: int, max_tokens: int) -> Iterator[dict[str, torch.Tensor]]:
    """Batches of samples (tensors [b, ...] by name) from windows of `tokens` that do not overlap; a short rest is left out.

    Raises:
        UserError: there is less text than one window.
    """
    objective, length = objective_of(model.config, model.tokenizer), raw_window(model.config).length
    if max_tokens:
        tokens = tokens[:max(length, max_tokens)]
    count = tokens.size // length
    if not count:
        raise UserError(f"The text has {tokens.size} tokens, but one sample of this model is made from {length}; give more text.")
    for start in range(0, count, batch_size):
        samples = [
            objective(tokens[index * length:(index + 1) * length], np.random.RandomState([_SEED, index]))
            for index in range(start, min(start + batch_size, count))
        ]
        yield {name: torch.from_numpy(np.stack([sample[name] for sample in samples])).to(model.device) for name in samples[0]}
