"""Probes against what they should measure, computed from the whole tensors: stream, gradient, attention, dead units, angles."""

import math

import numpy as np
import pytest
import torch
from losses import mean_loss

from megadsl.config.load import parse_config
from megadsl.monitor.moments import BLOCK_ROWS
from megadsl.monitor.probes import SignalProbes
from megadsl.monitor.signal import points_of

SHAPE = {"num_layers": 3, "hidden_size": 32, "num_attention_heads": 4, "seq_length": 16}


def batch_of(sequences: int = 4) -> dict[str, torch.Tensor]:
    tokens = torch.randint(0, 512, (sequences, 17), generator=torch.Generator().manual_seed(1))
    segments = torch.tensor([[1] * 9 + [2] * 7] * sequences)
    return {"tokens": tokens[:, :-1].contiguous(), "labels": tokens[:, 1:].contiguous(), "loss_mask": torch.ones(sequences, 16),
            "segments": segments, "prefix_length": torch.full((sequences,), 5)}


def probes_of(stack, plan, sequences: int | None = None) -> SignalProbes:
    return SignalProbes(stack.calls(), points_of(plan), stack.definition.embedding, torch.device("cpu"), sequences)


def caught(stack, batch) -> tuple[dict[str, torch.Tensor], dict[str, tuple]]:
    """(hidden state behind every entry of the list, with its gradient; arguments of every core attention and fc2), by hooks."""
    hidden, inner, handles = {}, {}, []
    for entry, module in stack.calls():
        if not isinstance(module, torch.nn.Module):
            continue

        def keep(_, arguments, output, name=entry.name):
            if "hidden" in output:
                output.hidden.retain_grad()
                hidden[name] = output.hidden

        handles.append(module.register_forward_hook(keep))
        for name, part in module.named_modules():
            if name.endswith(("core_attention", "linear_fc2")):
                handles.append(part.register_forward_pre_hook(
                    lambda _, arguments, key=f"{entry.name}.{name}": inner.__setitem__(key, arguments)))
    mean_loss(stack, batch).backward()
    for handle in handles:
        handle.remove()
    return hidden, inner


def moments(x: torch.Tensor) -> tuple[float, float]:
    """(second moment, token correlation) of [s, b, h]."""
    gram = torch.einsum("sbh,tbh->bst", x, x).double() / x.size(-1)
    s = x.size(0)
    square = gram.diagonal(dim1=1, dim2=2).mean()
    overlap = (gram.sum(dim=(1, 2)) - gram.diagonal(dim1=1, dim2=2).sum(1)).mean() / (s * (s - 1))
    return square.item(), (overlap / square).item()


def test_stream_gradient_and_angles_are_what_they_should_be(make_stack):
    stack, plan = make_stack(parse_config({"model": SHAPE}))
    batch = batch_of()
    hidden, _ = caught(stack, batch)
    plain = {name: parameter.grad.clone() for name, parameter in stack.canonical_parameters()}
    stack.zero_grad()
    probes = probes_of(stack, plan)
    with probes.watching():
        mean_loss(stack, batch).backward()
    found, points = probes.read(3), points_of(plan)
    assert found.iteration == 3
    places = {"embedding": 0, "final_norm": len(points) - 1} | {
        f"decoder.{point.layer}": index for index, point in enumerate(points) if point.kind == "ffn"}
    unit, _ = moments(hidden["final_norm"].grad)
    for name, place in places.items():
        square, correlation = moments(hidden[name].detach())
        gradient, gradient_correlation = moments(hidden[name].grad)
        for quantity, value in {
            "forward_second_moment": square, "token_correlation": correlation, "forward_mean": hidden[name].mean().item(),
            "gradient_variance": gradient / unit, "gradient_correlation": gradient_correlation,
        }.items():
            assert found.values[quantity][place] == pytest.approx(value, rel=1e-4, abs=1e-6), (name, quantity)
    before = hidden["embedding"].detach()
    for layer in range(3):
        after = hidden[f"decoder.{layer}"].detach()
        angle = torch.arccos(torch.nn.functional.cosine_similarity(before, after, dim=-1)).mean() / math.pi
        assert found.values["angular_distance"][places[f"decoder.{layer}"]] == pytest.approx(angle.item(), rel=1e-4)
        before = after
    for name, parameter in stack.canonical_parameters():
        assert torch.equal(parameter.grad, plain[name]), "probes must not change a gradient"
    with torch.no_grad():
        stack(stack.definition.inputs_of(batch))
    assert np.isnan(probes.read(4).values["forward_second_moment"]).all(), "closed probes measure nothing"


MASKS = {
    "causal": ({}, {}, lambda q, t: t <= q), "full": ({"family": "encoder"}, {}, lambda q, t: t >= 0),
    "packed": ({}, {"reset_attention_mask": True}, lambda q, t: (t <= q) & ((t < 9) == (q < 9))),
    "prefix": ({"num_query_groups": 2}, {"prefix_lm": True}, lambda q, t: (t <= q) | (t < 5)),
}


@pytest.mark.parametrize("name", MASKS)
def test_attention_logits_are_those_of_the_keys_that_are_seen(make_stack, monkeypatch, name):
    monkeypatch.setattr("megadsl.monitor.probes.QUERIES", 16)  # all of them, so that there is something to compare with
    model, task, rule = MASKS[name]
    stack, plan = make_stack(parse_config({"model": SHAPE | model, "task": task}))
    batch = batch_of()
    _, inner = caught(stack, batch)
    probes = probes_of(stack, plan)
    with probes.watching(), torch.no_grad():
        stack(stack.definition.inputs_of(batch))
    values, position = probes.read(0).values, torch.arange(16)
    seen = rule(position[:, None], position[None, :]).expand(16, 16)
    places = [index for index, point in enumerate(points_of(plan)) if point.kind == "self_attention"]
    for layer, place in enumerate(places):
        stack_name = "encoder" if model.get("family") else "decoder"
        query, key, *_ = inner[f"{stack_name}.{layer}.layer.self_attention.core_attention"]
        query, key = query[:, 0].double(), key[:, 0].double().repeat_interleave(query.size(2) // key.size(2), dim=1)
        logits = torch.einsum("qnd,tnd->nqt", query, key) / 8 ** 0.5
        rows = [(logits[head, q][seen[q]]) for head in range(4) for q in range(16)]
        wide = [row for row in rows if len(row) > 1]
        entropy = np.mean([(-(row.softmax(0) * row.log_softmax(0)).sum() / math.log(len(row))).item() for row in wide])
        assert values["attention_logit_variance"][place] == pytest.approx(np.mean([row.var(unbiased=False).item() for row in wide]), rel=1e-4)
        assert values["attention_logit_max"][place] == pytest.approx(max(row.max().item() for row in rows), rel=1e-4)
        assert values["attention_entropy"][place] == pytest.approx(entropy, rel=1e-4)


def test_dead_units_are_counted(make_stack):
    stack, plan = make_stack(parse_config({"model": SHAPE | {"activation": "relu"}}))
    with torch.no_grad():
        dict(stack.canonical_parameters())["decoder.1.mlp.linear_fc1.bias"][:40] = -1e4
    probes = probes_of(stack, plan)
    with probes.watching(), torch.no_grad():
        stack(stack.definition.inputs_of(batch_of()))
    dead = probes.read(0).values["dead_activations"]
    places = [index for index, point in enumerate(points_of(plan)) if point.kind == "ffn"]
    assert dead[places[1]] >= 40 / 128 > dead[places[0]] + 0.2 and np.isnan(dead[0])


def test_padding_is_left_out(make_stack):
    """A batch with garbage behind its sequences' ends measures as one whose positions are all real."""
    stack, plan = make_stack(parse_config({"model": SHAPE | {"family": "encoder"}, "task": {"reset_attention_mask": True}}))
    short, long = batch_of(), batch_of()
    for name, tensor in short.items():
        short[name] = tensor[:, :9] if tensor.dim() > 1 else tensor
    long["tokens"][:, 9:] = 7
    found = []
    for batch, real in ((short, {}), (long, {"encoder": torch.arange(16).expand(4, 16) < 9})):
        probes = probes_of(stack, plan)
        with probes.watching(real), torch.no_grad():
            stack(stack.definition.inputs_of(batch))
        found.append(probes.read(0).values)
    for quantity in ("forward_second_moment", "forward_mean", "token_correlation", "angular_distance"):
        np.testing.assert_allclose(found[1][quantity], found[0][quantity], rtol=1e-4, atol=1e-6)


def test_more_layers_than_a_block(make_stack):
    """Layers at the border of two blocks lose neither their moments nor their angle."""
    layers = BLOCK_ROWS + 3
    stack, plan = make_stack(parse_config({"model": SHAPE | {"num_layers": layers, "hidden_size": 16, "num_attention_heads": 2}}))
    probes = probes_of(stack, plan, 1)
    with probes.watching():
        mean_loss(stack, batch_of()).backward()
    values, points = probes.read(0).values, points_of(plan)
    with probes.watching():  # several passes in one block are the mean of passes that are all the same
        for _ in range(3):
            mean_loss(stack, batch_of()).backward()
    again = probes.read(0).values
    for quantity in ("forward_second_moment", "gradient_variance", "angular_distance"):
        np.testing.assert_allclose(again[quantity], values[quantity], rtol=1e-5)
    assert np.isfinite(values["forward_second_moment"]).all() and np.isfinite(values["gradient_variance"]).all()
    assert [np.isfinite(angle) for angle in values["angular_distance"]] == [point.kind == "ffn" for point in points]
