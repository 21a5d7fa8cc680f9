"""The list of layers: names, the cut into stages, and every part that the model section offers."""

from itertools import pairwise

import pytest
import torch

from megadsl.config.load import parse_config
from megadsl.model.stack import LayerEntry, stage_bounds

SHAPE = {"num_layers": 3, "hidden_size": 32, "num_attention_heads": 4, "seq_length": 16}


def test_canonical_names_carry_layer_and_role(make_stack):
    stack, _ = make_stack(parse_config({"model": SHAPE}))
    names = [name for name, _ in stack.canonical_parameters()]
    assert len(names) == len(set(names)) == 3 * 12 + 4
    assert {"embedding.word.table.weight", "embedding.position", "final_norm.weight"} < set(names)
    assert "decoder.2.self_attention.linear_qkv.weight" in names and "decoder.0.mlp.linear_fc2.bias" in names


PARTS = [
    {"activation": name} for name in ("relu", "gelu", "tanh_gelu", "silu", "squared_relu", "swiglu", "geglu")
] + [
    {"normalization": "RMSNorm"}, {"num_query_groups": 2}, {"qk_layernorm": True}, {"add_bias_linear": False},
    {"untie_embeddings_and_output_weights": True}, {"kv_channels": 16}, {"ffn_hidden_size": 48},
]


@pytest.mark.parametrize("part", PARTS, ids=lambda part: "-".join(f"{k}={v}" for k, v in part.items()))
def test_every_part_builds_and_every_parameter_gets_a_gradient(make_stack, part):
    stack, _ = make_stack(parse_config({"model": SHAPE | part}))
    tokens = torch.randint(0, 512, (2, 17), generator=torch.Generator().manual_seed(1))
    loss = stack(tokens[:, :-1].contiguous(), (tokens[:, 1:].contiguous(), torch.ones(2, 16)))
    loss.backward()
    assert torch.isfinite(loss)
    for name, parameter in stack.canonical_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
        # A key's bias shifts all scores of a query alike, which softmax does not see; the query's bias does not.
        assert parameter.grad.abs().max() > 0, name


def test_causality(make_stack):
    stack, _ = make_stack(parse_config({"model": SHAPE}))
    tokens = torch.randint(0, 512, (1, 16), generator=torch.Generator().manual_seed(1))
    changed = tokens.clone()
    changed[0, 9] = (changed[0, 9] + 1) % 512
    stack.eval()
    first, second = stack(tokens), stack(changed)  # [s, b, v]
    assert torch.equal(first[:9], second[:9]) and not torch.allclose(first[9:], second[9:])


@pytest.mark.parametrize("layers, stages", [(6, 1), (6, 2), (7, 3), (4, 4), (1000, 16)])
def test_stages_share_the_layers_evenly(layers, stages):
    entries = [LayerEntry("word", None), LayerEntry("position", None)]
    entries += [LayerEntry(f"decoder.{index}", None, is_layer=True) for index in range(layers)]
    entries += [LayerEntry("norm", None), LayerEntry("head", None)]
    bounds = stage_bounds(entries, stages)
    assert bounds[0] == 0 and bounds[-1] == len(entries) and len(bounds) == stages + 1
    counts = [sum(entry.is_layer for entry in entries[start:stop]) for start, stop in pairwise(bounds)]
    assert sum(counts) == layers and max(counts) - min(counts) <= 1 and min(counts) >= 1
