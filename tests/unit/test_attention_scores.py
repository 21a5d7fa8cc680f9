"""Attention scores that are capped or searched for their largest one: against the definition, with all kinds of masks and heads."""

import math

import pytest
import torch
from megatron.core.transformer.enums import AttnMaskType
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from megadsl.config.load import parse_config
from megadsl.config.model import ModelConfig
from megadsl.model.core_attention import SEARCHED_QUERIES, ScaledDotProductAttention, capped_score
from megadsl.model.layer import transformer_config
from megadsl.model.masks import Masks, additive, visibility, visible

MODEL = ModelConfig()
CPU = torch.device("cpu")


def core_attention(softcap: float, dropout: float = 0.0) -> ScaledDotProductAttention:
    config = transformer_config(ModelConfig(attention_dropout=dropout))
    return ScaledDotProductAttention(config, 1, None, "self", softcap=softcap)


def projections(queries: int, keys: int, heads: int, groups: int, size: int = 16, scale: float = 3.0) -> list[torch.Tensor]:
    """query [s, b, n, d], key and value [t, b, g, d] whose scores have a standard deviation of scale^2."""
    generator = torch.Generator().manual_seed(queries + heads)
    return [torch.randn(length, 2, count, size, generator=generator) * factor for length, count, factor in (
        (queries, heads, scale), (keys, groups, scale), (keys, groups, 1.0))]


def definition(query, key, value, softcap: float, mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """(context [s, b, n * d], visible scores [b, n, s, t] with -inf elsewhere), head by head in fp64."""
    heads, repeat = query.size(2), query.size(2) // key.size(2)
    contexts, scores = [], []
    for head in range(heads):
        q, k, v = query[:, :, head].double(), key[:, :, head // repeat].double(), value[:, :, head // repeat].double()
        score = torch.einsum("sbd,tbd->bst", q, k) / math.sqrt(q.size(-1))
        capped = softcap * torch.tanh(score / softcap) if softcap else score
        added = torch.zeros(()) if mask is None else mask[:, min(head, mask.size(1) - 1)].double()
        contexts.append(torch.einsum("bst,tbd->sbd", (capped + added).softmax(-1), v))
        scores.append(score.masked_fill((added == -torch.inf).expand_as(score), -torch.inf))
    return torch.stack(contexts, 2).flatten(2), torch.stack(scores, 1)


@pytest.mark.parametrize("heads, groups", [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize("kind", ["causal", "full", "cross", "segments", "bias"])
def test_capped_scores_are_as_defined(kind, heads, groups):
    queries, keys = 20, 12 if kind == "cross" else 20
    query, key, value = projections(queries, keys, heads, groups)
    mask, mask_type, dense = None, AttnMaskType.padding, None
    if kind == "causal":
        mask_type, dense = AttnMaskType.causal, additive(visible(visibility(True), 1, 20, 20, CPU), torch.float32)
    if kind == "segments":
        segments = torch.tensor([[1] * 8 + [2] * 12, [1] * 15 + [0] * 5])
        mask = dense = additive(visible(visibility(True, 0, segments, segments), 2, 20, 20, CPU), torch.float32)
    if kind == "bias":
        mask = dense = torch.randn(1, heads, queries, keys, generator=torch.Generator().manual_seed(1))
    expected, _ = definition(query, key, value, 2.0, dense)
    found = core_attention(2.0)(query, key, value, mask, attn_mask_type=mask_type)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)
    plain = core_attention(0.0)(query, key, value, mask, attn_mask_type=mask_type)
    torch.testing.assert_close(core_attention(1e4)(query, key, value, mask, attn_mask_type=mask_type), plain, rtol=1e-3, atol=1e-4)
    assert (plain - found).abs().max() > 0.1, "a cap that is not applied"


def test_flex_attention_caps_alike():
    """On a GPU the same rule is flex_attention's score_mod; here it writes every score out."""
    query, key, value = projections(140, 140, 4, 2)
    blocks = create_block_mask(visibility(True), 2, None, 140, 140, device=CPU)
    core = core_attention(2.0).eval()
    with torch.no_grad():
        torch.testing.assert_close(core(query, key, value, blocks), core(query, key, value, None, attn_mask_type=AttnMaskType.causal),
                                   rtol=1e-4, atol=1e-5)
    assert capped_score(2.0) is capped_score(2.0) and capped_score(2.0) is not capped_score(3.0)
    q, k, v = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
    with torch.no_grad():
        plain = flex_attention(q, k, v, block_mask=blocks, enable_gqa=True).permute(2, 0, 1, 3).flatten(2)
        torch.testing.assert_close(core_attention(0.0).eval()(query, key, value, blocks), plain)


def test_capped_scores_get_a_block_mask_on_a_gpu(monkeypatch):
    """Also where SDPA would need no mask; blockwise says so for a GPU, and what is made of it is looked at on the CPU."""
    monkeypatch.setattr("megadsl.model.masks.blockwise", lambda *arguments: True)
    capped = ModelConfig(attention_logit_softcap=5.0)
    for causal in (True, False):
        mask = Masks(capped, causal, False)._make(140, 2, torch.bfloat16, CPU, causal, None, None, None, None)
        seen = visible(mask.mask_mod, 2, 140, 140, CPU).expand(1, 1, 140, 140)
        assert torch.equal(seen[0, 0], torch.ones(140, 140).tril().bool() if causal else torch.ones(140, 140).bool())
        assert Masks(MODEL, causal, False)._make(140, 2, torch.bfloat16, CPU, causal, None, None, None, None) is None
    memory = Masks(capped, True, False)._make(140, 2, torch.bfloat16, CPU, False, None, None, None, None, 300)
    assert memory.seq_lengths == (140, 300)


def test_dropout_of_capped_attention_keeps_the_mean(one_process):
    from megadsl.parallel.rng import seed_micro_batch

    seed_micro_batch(0, 0, 0)
    query, key, value = projections(20, 20, 4, 4)
    plain = core_attention(2.0)(query, key, value, None)
    core = core_attention(2.0, dropout=0.5).train()
    draws = torch.stack([core(query, key, value, None) for _ in range(400)])
    assert (draws[0] != draws[1]).any()
    error = (draws.mean(0) - plain) / (draws.std(0) / 20.0)
    assert error.abs().mean() < 1.0 and error.square().mean() == pytest.approx(1.0, abs=0.15)
    assert torch.equal(core.eval()(query, key, value, None), plain)


@pytest.mark.parametrize("kind", ["causal", "full", "segments", "blocks"])
@pytest.mark.parametrize("heads, groups", [(4, 4), (4, 2)])
def test_the_largest_score_of_every_head(kind, heads, groups):
    length = SEARCHED_QUERIES + 44
    query, key, value = projections(length, length, heads, groups)
    segments = torch.randint(0, 4, (2, length), generator=torch.Generator().manual_seed(0)).sort(dim=1).values
    causal, parts = kind == "causal", None if kind in ("causal", "full") else segments
    sees = visibility(causal or kind == "blocks", 0, parts, parts)
    dense = additive(visible(sees, 2, length, length, CPU), torch.float32)
    mask = {"segments": dense, "blocks": create_block_mask(sees, 2, None, length, length, device=CPU)}.get(kind)
    _, scores = definition(query, key, value, 0.0, dense)
    core = core_attention(3.0 if kind == "full" else 0.0).train()
    core.largest_scores = torch.full((heads,), -torch.inf)
    with torch.no_grad():
        core(query * 0.1, key, value, mask, attn_mask_type=AttnMaskType.causal if causal else AttnMaskType.padding)
        core(query, key, value, mask, attn_mask_type=AttnMaskType.causal if causal else AttnMaskType.padding)
    torch.testing.assert_close(core.largest_scores.double(), scores.amax(dim=(0, 2, 3)), rtol=1e-5, atol=1e-5)
    everywhere = definition(query, key, value, 0.0, None)[1].amax(dim=(0, 2, 3))
    assert kind == "full" or (everywhere > core.largest_scores + 1e-3).any(), "hidden scores must not count"
    before = core.largest_scores.clone()
    core.eval()(query * 9, key, value, mask if kind == "segments" else None)
    assert torch.equal(core.largest_scores, before), "validation counts nothing"


@pytest.mark.parametrize("family", ["decoder", "encoder", "encoder_decoder"])
@pytest.mark.parametrize("recompute", [False, True])
def test_a_capped_model_learns_through_the_cap(make_stack, family, recompute):
    """The gradient of a query weight against finite differences, at scores that the cap bends."""
    stack, _ = make_stack(parse_config({
        "model": {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "seq_length": 16, "family": family,
                  "attention_logit_softcap": 1.0}, "training": {"recompute": recompute},
    }))
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(5, 512, (2, 16), generator=generator)
    batch = {"tokens": tokens, "source_tokens": tokens, "target_tokens": tokens, "labels": tokens, "loss_mask": torch.ones(2, 16)}

    def loss() -> torch.Tensor:
        return sum(stack.task.loss(stack(stack.definition.inputs_of(batch)), batch)) / 32

    weights = [parameter for name, parameter in stack.canonical_parameters() if "linear_q" in name and name.endswith("weight")]
    with torch.no_grad():
        for weight in weights:
            weight.mul_(3.0)
    loss_here = loss()
    loss_here.backward()
    weight = weights[-1]
    direction = weight.grad / weight.grad.norm()  # in which the loss changes most, so that rounding and curvature matter least
    expected, step, found = weight.grad.norm().item(), 3e-2, []
    with torch.no_grad():
        for sign in (1, -1):
            weight.add_(direction, alpha=sign * step)
            found.append(loss().item())
            weight.sub_(direction, alpha=sign * step)
    assert (found[0] - found[1]) / (2 * step) == pytest.approx(expected, rel=0.03) and expected > 1e-3
