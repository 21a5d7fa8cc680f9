"""Megatron-core transformer layers customised through their specs, and the list of layers that makes a model."""

import megadsl.parallel.device  # noqa: F401  (before Megatron-core, which every file of this room imports)
