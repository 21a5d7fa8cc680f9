"""z-loss: its value and gradient, its place in the log, and what the theory says of the gradient that it adds at the head."""

import math

import pytest
import torch
from ranks import ForkServer

from megadsl.config.load import parse_config
from megadsl.errors import UserError
from megadsl.theory.inputs import TokenStatistics, cross_entropy_overlaps

VOCABULARY, SHAPE = 64, (7, 3)  # [s, b]


def _logits_and_labels() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = 5.0 * torch.randn(*SHAPE, VOCABULARY, generator=generator)
    labels = torch.randint(0, VOCABULARY, SHAPE[::-1], generator=generator)
    return logits, labels, torch.randn(2, *SHAPE[::-1], generator=generator)


def _on_rank(size: int) -> list[torch.Tensor]:
    """Losses, normalizers and this rank's gradient of a weighted sum of both."""
    import os

    from megadsl.model.loss import token_losses_and_log_normalizers
    from megadsl.parallel.device import prepare_device
    from megadsl.parallel.groups import destroy_groups, initialize_groups
    from megadsl.parallel.launch import Launch
    from megadsl.parallel.topology import Topology

    device, rank = prepare_device("cpu"), int(os.environ["RANK"])
    launch = Launch(rank, size, rank, os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), "torchrun")
    initialize_groups(launch, Topology(size, 1, 1), device)
    logits, labels, weights = _logits_and_labels()
    shard = logits.chunk(size, dim=-1)[rank].clone().requires_grad_()
    losses, normalizers = token_losses_and_log_normalizers(shard, labels)
    (losses * weights[0] + normalizers.square() * weights[1]).sum().backward()
    destroy_groups()
    return [losses.detach(), normalizers.detach(), shard.grad]


def test_value_and_gradient_over_a_sliced_vocabulary():
    logits, labels, weights = _logits_and_labels()
    logits.requires_grad_()
    expected = logits.logsumexp(dim=-1).T
    losses = torch.nn.functional.cross_entropy(logits.transpose(0, 1).flatten(0, 1), labels.flatten(), reduction="none").view_as(labels)
    (losses * weights[0] + expected.square() * weights[1]).sum().backward()
    with ForkServer() as server:
        for size in (1, 2, 4):
            found = server.run(size, _on_rank, size)
            for one in found:
                torch.testing.assert_close(one[0], losses.detach(), rtol=1e-5, atol=1e-5)
                torch.testing.assert_close(one[1], expected.detach(), rtol=1e-6, atol=1e-5)
            torch.testing.assert_close(torch.cat([one[2] for one in found], dim=-1), logits.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family, task", [("decoder", {}), ("encoder", {"sentence_order": True}), ("encoder_decoder", {})])
def test_it_is_a_part_of_its_own_beside_the_tokens(make_stack, family, task):
    def parts(coefficient: float) -> dict[str, float]:
        stack, _ = make_stack(parse_config({
            "model": {"num_layers": 2, "hidden_size": 32, "seq_length": 16, "family": family, "num_tokentypes": 2 * (family == "encoder")},
            "task": {**task, "z_loss": coefficient},
        }))
        tokens = torch.randint(5, 512, (2, 16), generator=torch.Generator().manual_seed(1))
        counted = (torch.arange(16) % 3 > 0).float().expand(2, 16)
        batch = {"tokens": tokens, "source_tokens": tokens, "target_tokens": tokens, "labels": tokens, "loss_mask": counted,
                 "tokentypes": torch.zeros_like(tokens), "sentence_order": torch.tensor([0, 1])}
        output = stack(stack.definition.inputs_of(batch))
        squares = (output["logits"].detach().logsumexp(dim=-1).T.square() * counted).sum().item()
        found = stack.task.loss(output, batch)
        counts = stack.task.counts(batch)
        assert len(found) == len(counts) == len(stack.task.loss_parts)
        values = {part.name: (float(total), count) for part, total, count in zip(stack.task.loss_parts, found, counts, strict=True)}
        return {**values, "squares": (squares, counted.sum().item())}

    plain, with_part = parts(0.0), parts(0.25)
    assert "z_loss" not in plain
    assert with_part["z_loss"][0] == pytest.approx(0.25 * plain["squares"][0], rel=1e-5)
    assert with_part.pop("z_loss")[1] == plain["squares"][1]
    assert {name: pytest.approx(value, rel=1e-5) for name, value in with_part.items()} == plain


def test_a_negative_coefficient_is_refused():
    from megadsl.tasks.registry import task_of

    with pytest.raises(UserError, match=r"task\.z_loss"):
        task_of(parse_config({"task": {"z_loss": -1.0}}))


@pytest.mark.parametrize("z_loss", [0.0, 1e-4, 0.1])
def test_the_gradient_at_the_head_is_as_predicted(z_loss):
    """(second moment, overlap of two tokens) of the gradient of cross-entropy and z-loss against sampling."""
    hidden, vocabulary, tokens, r, u = 128, 300, 24, 0.4, 1.0
    generator = torch.Generator().manual_seed(3)
    found = []
    for _ in range(60):
        shared, own = torch.randn(1, hidden, generator=generator), torch.randn(tokens, hidden, generator=generator)
        h = torch.nn.functional.layer_norm(math.sqrt(r) * shared + math.sqrt(1.0 - r) * own, (hidden,)).requires_grad_()
        logits = h @ (math.sqrt(u / hidden) * torch.randn(hidden, vocabulary, generator=generator))
        labels = torch.randint(0, vocabulary, (tokens,), generator=generator)
        loss = torch.nn.functional.cross_entropy(logits, labels, reduction="sum") + z_loss * logits.logsumexp(-1).square().sum()
        gradient, = torch.autograd.grad(loss, h)
        squares, total = gradient.square().sum().item(), gradient.sum(0).square().sum().item()
        found.append((squares / tokens / u, (total - squares) / tokens / (tokens - 1) / u))
    mean, error = torch.tensor(found).mean(0), torch.tensor(found).std(0) / math.sqrt(len(found))
    predicted = torch.tensor(cross_entropy_overlaps(hidden, vocabulary, 1.0 / vocabulary, r, u, z_loss))
    assert ((mean - predicted).abs() < 4.0 * error + 0.05 * predicted.abs()).all(), (mean, predicted, error)
    if z_loss == 0.1:
        without = torch.tensor(cross_entropy_overlaps(hidden, vocabulary, 1.0 / vocabulary, r, u))
        assert (mean[1] - without[1]).abs() > 8.0 * error[1], "large enough to be seen without it"


def test_the_plan_knows_it():
    from megadsl.config.model import ModelConfig, SchemeConfig
    from megadsl.schemes.registry import build_plan

    model = ModelConfig(num_layers=2, hidden_size=64)
    plans = [build_plan(model, SchemeConfig(), TokenStatistics(512, 0.02, z_loss=z_loss), 512) for z_loss in (0.0, 1e-4, 0.1)]
    correlations = [plan.final.gradient_correlation for plan in plans]
    assert correlations[1] == pytest.approx(correlations[0], rel=0.01) and correlations[2] > 1.2 * correlations[0]
