"""Random numbers while training: seeds are a pure function of (seed, micro-batch, stage, tensor rank).

A resumed run needs no saved generator state, and data-parallel layouts draw the same masks for the same micro-batch.
Where activations are replicated over tensor ranks (hidden dropout) the default generator is used and is equal on them;
where they are sharded (attention dropout) Megatron's tracker is forked and differs from rank to rank.
"""

import hashlib

import torch
import megadsl.parallel.device  # noqa: F401  isort: skip  (before Megatron-core)
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed


def key_from(*keys: int | str) -> int:
    """A 128-bit number from any keys; equal keys give equal numbers on every machine."""
    return int.from_bytes(hashlib.blake2b("/".join(map(str, keys)).encode(), digest_size=16).digest(), "little")


def seed_from(*keys: int | str) -> int:
    """The same as a seed of 62 bits, for torch."""
    digest = hashlib.blake2b("/".join(map(str, keys)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 2


def seed_micro_batch(seed: int, micro_batch: int, stage: int) -> None:
    """Set the default generator and Megatron's tracker for one forward pass.

    Args:
        seed: training.seed.
        micro_batch: index of the micro-batch since the start of the run, counted over all data-parallel ranks.
        stage: pipeline stage.
    """
    value = seed_from(seed, "dropout", micro_batch, stage)
    torch.default_generator.manual_seed(value)  # torch.manual_seed takes 1 ms where there is no GPU to seed
    # Adds the tensor-parallel rank to the tracker's seed, and seeds the GPU's default generator.
    model_parallel_cuda_manual_seed(value)
