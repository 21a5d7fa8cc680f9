"""Attention over packed documents, for tools/gpu_check.py: flex_attention's BlockMask against the dense mask, and no mask at all.

A chain of attentions stands for a stack: what it keeps for the backward pass tells whether every layer keeps a mask of its own.
Shape letters: s sequence, b batch, n heads, d head size.
"""

import torch
from torch.nn.attention.flex_attention import create_block_mask

from gpu_checks.speed import timed
from megadsl.config.load import parse_config
from megadsl.parallel.device import prepare_device


def compare(device_name: str, seq_length: int, batch: int, heads: int, head_dim: int, layers: int, precision: str) -> dict[str, float]:
    """Relative differences of outputs and gradients, seconds and peak bytes by kind of mask; a CPU has outputs only."""
    device = prepare_device(device_name)
    from megadsl.model.core_attention import ScaledDotProductAttention
    from megadsl.model.layer import transformer_config
    from megadsl.model.masks import additive, visibility, visible
    from megadsl.model.precision import DTYPES
    from megatron.core.transformer.enums import AttnMaskType

    generator, dtype = torch.Generator().manual_seed(0), DTYPES[precision]
    segments = torch.randint(1, 6, (batch, seq_length), generator=generator).sort(dim=1).values.to(device)
    hidden = torch.randn(seq_length, batch, heads, head_dim, generator=generator).to(device, dtype)
    config = parse_config({"model": {"hidden_size": heads * head_dim, "num_attention_heads": heads}})
    core = ScaledDotProductAttention(transformer_config(config.model), 1, AttnMaskType.causal, "self").train()
    sees = visibility(True, 0, segments, segments)
    masks = {
        "none": None, "dense": additive(visible(sees, batch, seq_length, seq_length, device), dtype),
        "blockwise": create_block_mask(sees, batch, None, seq_length, seq_length, device=device),
    }
    trained = device.type == "cuda"  # flex_attention has no backward pass on a CPU
    found, outputs, gradients = {}, {}, {}

    def run(kind: str) -> None:
        start = hidden.clone().requires_grad_(trained)
        value = start
        for _ in range(layers):
            value = value + core(value, value, value, masks[kind], attn_mask_type=AttnMaskType.causal).view_as(value)
        if trained:
            value.float().square().mean().backward()
            gradients[kind] = start.grad.float()
        outputs[kind] = value.detach().float()

    for kind in masks:
        run(kind)  # compiles
        if trained:
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
        found[f"seconds_{kind}"] = timed(lambda kind=kind: run(kind), device)
        if trained:
            found[f"bytes_{kind}"] = torch.cuda.max_memory_allocated(device) - before
    found["outputs_apart"] = apart(outputs["blockwise"], outputs["dense"])
    if trained:
        found["gradients_apart"] = apart(gradients["blockwise"], gradients["dense"])
    found["masked_apart"] = apart(outputs["none"], outputs["dense"])  # that the mask matters at all
    return found


def apart(value: torch.Tensor, expected: torch.Tensor) -> float:
    """Root mean square of the difference over that of the expected."""
    return float((value - expected).square().mean().sqrt() / expected.square().mean().sqrt())
