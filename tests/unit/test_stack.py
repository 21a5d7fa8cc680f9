"""The list of layers: names, the cut into stages, and every part that the model section offers, for every family."""

from itertools import pairwise

import pytest
import torch
from losses import mean_loss

from megadsl.config import Config
from megadsl.config.load import parse_config
from megadsl.model.stack import LayerEntry, stage_bounds

SHAPE = {"num_layers": 3, "hidden_size": 32, "num_attention_heads": 4, "seq_length": 16, "decoder_seq_length": 12}


def batch_of(config: Config) -> dict[str, torch.Tensor]:
    """Random tokens for a model of any task."""
    generator, model = torch.Generator().manual_seed(1), config.model
    target = model.target_length if model.family == "encoder_decoder" else 16

    def tokens(length: int) -> torch.Tensor:
        return torch.randint(0, 512, (2, length), generator=generator)

    return {
        "tokens": tokens(16), "source_tokens": tokens(16), "target_tokens": tokens(target), "labels": tokens(target),
        "loss_mask": torch.ones(2, target), "segments": torch.tensor([[1] * 9 + [2] * 7] * 2),
        "source_segments": torch.tensor([[1] * 12 + [0] * 4] * 2), "tokentypes": torch.tensor([[0] * 8 + [1] * 8] * 2),
        "prefix_length": torch.tensor([3, 5]), "sentence_order": torch.tensor([0, 1]),
    }


def test_canonical_names_carry_layer_and_role(make_stack):
    stack, _ = make_stack(parse_config({"model": SHAPE}))
    names = [name for name, _ in stack.canonical_parameters()]
    assert len(names) == len(set(names)) == 3 * 12 + 4
    assert {"embedding.word.table.weight", "embedding.position", "final_norm.weight"} < set(names)
    assert "decoder.2.self_attention.linear_qkv.weight" in names and "decoder.0.mlp.linear_fc2.bias" in names


@pytest.mark.parametrize("family, task, per_layer, others", [
    # word, position, types; final norm; dense and norm of the head, its bias
    ("encoder", {"sentence_order": True}, [12], 3 + 2 + 4 + 1 + 4),
    # encoder's position and final norm, decoder's position and final norm, the shared word table
    ("encoder_decoder", {}, [12, 12 + 8], 1 + 2 * 3),
])
def test_parameters_of_the_other_families(make_stack, family, task, per_layer, others):
    types = {"num_tokentypes": 2} if family == "encoder" else {}
    stack, _ = make_stack(parse_config({"model": SHAPE | types | {"family": family}, "task": task}))
    names = [name for name, _ in stack.canonical_parameters()]
    assert len(names) == len(set(names)) == 3 * sum(per_layer) + others


PARTS = [
    {"activation": name} for name in ("relu", "gelu", "tanh_gelu", "silu", "squared_relu", "swiglu", "geglu")
] + [
    {"position_embedding_type": name} for name in ("sinusoidal", "rope", "relative", "none")
] + [
    {"normalization": "RMSNorm"}, {"num_query_groups": 2}, {"qk_layernorm": True}, {"add_bias_linear": False},
    {"untie_embeddings_and_output_weights": True}, {"kv_channels": 16}, {"ffn_hidden_size": 48}, {"embedding_layernorm": True},
    {"norm_position": "post"},
]


@pytest.mark.parametrize("family", ["decoder", "encoder", "encoder_decoder"])
@pytest.mark.parametrize("part", PARTS, ids=lambda part: "-".join(f"{k}={v}" for k, v in part.items()))
def test_every_part_builds_and_every_parameter_gets_a_gradient(make_stack, part, family):
    """And activations that are recomputed give the same loss and the same gradients."""
    gradients = {}
    for recompute in (False, True):
        config = parse_config({"model": SHAPE | part | {"family": family}, "training": {"recompute": recompute}})
        stack, _ = make_stack(config)
        loss = mean_loss(stack, batch_of(config))
        loss.backward()
        assert torch.isfinite(loss)
        for name, parameter in stack.canonical_parameters():
            assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
            # A key's bias shifts all scores of a query alike, which softmax does not see; the query's bias does not.
            assert parameter.grad.abs().max() > 0, name
        gradients[recompute] = {name: parameter.grad for name, parameter in stack.canonical_parameters()}
    for name, gradient in gradients[False].items():
        torch.testing.assert_close(gradients[True][name], gradient, rtol=1e-5, atol=1e-7, msg=name)


OPTIONS = [
    ("decoder", {}, {"reset_attention_mask": True, "reset_position_ids": True}), ("decoder", {}, {"prefix_lm": True}),
    ("encoder", {"num_tokentypes": 2}, {"sentence_order": True}), ("encoder", {}, {"reset_attention_mask": True}),
    ("encoder_decoder", {}, {"corruption": "infilling"}),
]


@pytest.mark.parametrize("family, model, task", OPTIONS)
def test_every_objectives_context_reaches_the_model(make_stack, family, model, task):
    """Each tensor that the objective adds changes the loss when it changes."""
    config = parse_config({"model": SHAPE | model | {"family": family}, "task": task})
    stack, _ = make_stack(config)
    stack.eval()
    batch = batch_of(config)
    with torch.no_grad():
        loss = mean_loss(stack, batch)
        for name in stack.definition.inputs[1:]:
            if name != "target_tokens":
                changed = batch | {name: torch.ones_like(batch[name])}
                assert not torch.isclose(mean_loss(stack, changed), loss, rtol=1e-6), name


def test_causality(make_stack):
    stack, _ = make_stack(parse_config({"model": SHAPE}))
    tokens = torch.randint(0, 512, (1, 16), generator=torch.Generator().manual_seed(1))
    changed = tokens.clone()
    changed[0, 9] = (changed[0, 9] + 1) % 512
    stack.eval()
    first, second = (stack({"tokens": each})["logits"] for each in (tokens, changed))  # [s, b, v]
    assert torch.equal(first[:9], second[:9]) and not torch.allclose(first[9:], second[9:])


def test_an_encoder_sees_both_sides_and_a_target_its_past_and_the_source(make_stack):
    def changed(tokens: torch.Tensor, position: int) -> torch.Tensor:
        other = tokens.clone()
        other[:, position] = (other[:, position] + 1) % 512
        return other

    config = parse_config({"model": SHAPE | {"family": "encoder"}})
    stack, _ = make_stack(config)
    tokens = batch_of(config)["tokens"]
    stack.eval()
    first, second = (stack({"tokens": each})["logits"] for each in (tokens, changed(tokens, 9)))
    assert not torch.allclose(first[:9], second[:9])

    config = parse_config({"model": SHAPE | {"family": "encoder_decoder"}})
    stack, _ = make_stack(config)
    stack.eval()
    source, target = (batch_of(config)[name] for name in ("source_tokens", "target_tokens"))
    plain, later, elsewhere = (
        stack({"source_tokens": read, "target_tokens": written})["logits"]
        for read, written in ((source, target), (source, changed(target, 7)), (changed(source, 9), target))
    )
    assert torch.equal(plain[:7], later[:7]) and not torch.allclose(plain[7:], later[7:])
    assert not torch.allclose(plain[0], elsewhere[0])


@pytest.mark.parametrize("scheme, norm", [
    ("rezero", "pre"), ("layerscale", "pre"), ("layernorm_scaling", "pre"), ("completep", "pre"), ("keel", "post"),
    ("deepnorm", "post"),
])
def test_every_scheme_builds_what_its_plan_says(make_stack, scheme, norm):
    config = parse_config({"model": SHAPE | {"norm_position": norm}, "scheme": scheme})
    stack, plan = make_stack(config)
    parameters = dict(stack.canonical_parameters())
    gates = {name: parameter for name, parameter in parameters.items() if name.endswith("branch_scale")}
    assert {name.rsplit(".", 2)[1] for name in gates} == (
        {"self_attn_bda", "mlp_bda"} if plan.sublayers[0].gate != "fixed" else set())
    for gate in gates.values():
        assert (gate == plan.sublayers[0].branch_scale).all() and gate.numel() == (1 if scheme == "rezero" else 32)
    inner = any("input_layernorm" in name for name in parameters)
    outer = any("self_attn_bda.norm" in name for name in parameters)
    assert (inner, outer) == {"pre": (True, False), "post": (False, True), "both": (True, True), "none": (False, False)}[
        plan.norm_position]
    loss = mean_loss(stack, batch_of(config))
    loss.backward()
    assert torch.isfinite(loss) and all(gate.grad.abs().max() > 0 for gate in gates.values())


@pytest.mark.parametrize("layers, stages", [(6, 1), (6, 2), (7, 3), (4, 4), (1000, 16)])
def test_stages_share_the_layers_evenly(layers, stages):
    entries = [LayerEntry("word", None), LayerEntry("position", None)]
    entries += [LayerEntry(f"decoder.{index}", None, takes=("hidden",)) for index in range(layers)]
    entries += [LayerEntry("norm", None), LayerEntry("head", None)]
    bounds = stage_bounds(entries, stages)
    assert bounds[0] == 0 and bounds[-1] == len(entries) and len(bounds) == stages + 1
    counts = [sum(bool(entry.takes) for entry in entries[start:stop]) for start, stop in pairwise(bounds)]
    assert sum(counts) == layers and max(counts) - min(counts) <= 1 and min(counts) >= 1
