"""What is observed of a model is what is there: moments, gradients and attention against plain formulas, skipped layers against branches
that are switched off, plans against the model that they were drawn for."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from losses import mean_loss

from export_models import MODELS, make_config
from megadsl.config import Config
from megadsl.model.residual import ResidualConnection
from megadsl.monitor.diagnosis.fitting import candidates, fit_plans
from megadsl.monitor.diagnosis.observe import Observation
from megadsl.monitor.diagnosis.result import Skip
from megadsl.monitor.diagnosis.skipping import choose_skips, skip_losses
from megadsl.monitor.signal import points_of
from megadsl.tasks.planning import plan_for_run
from megadsl.tasks.task import EvaluationRequest


def shape_of(architecture: str) -> dict:
    """With room for the targets of the task."""
    model = MODELS[architecture]
    return {**model, "decoder_seq_length": model["seq_length"]} if "decoder_seq_length" in model else model


def samples_of(stack, config: Config, count: int = 4) -> dict[str, torch.Tensor]:
    return stack.task.collate(stack.task.evaluation_samples(EvaluationRequest(config.data.datasets[0].path, "train"), count))


def observed(stack, plan, batch) -> Observation:
    stack.eval().requires_grad_(False)
    with Observation(stack, points_of(plan), stack.definition.embedding) as seen:
        totals = stack.task.loss(seen.run(stack.definition.inputs_of(batch)), batch)
        sum(total / count for total, count in zip(totals, stack.task.counts(batch), strict=True)).backward()
    return seen


@pytest.mark.parametrize("architecture", MODELS)
def test_moments_and_gradients(architecture, small_data, make_stack):
    config = make_config(small_data, shape_of(architecture))
    stack, plan = make_stack(config)
    batch = samples_of(stack, config)
    values = observed(stack, plan, batch).values()
    # Without padding the points behind whole layers are their outputs; the last one stands in front of the final norm.
    kept, stack_name = {}, plan.stacks[-1]
    stack.requires_grad_(True)
    hooks = [call.register_forward_hook(lambda module, given, value, name=entry.name: keep(kept, name, value.hidden))
             for entry, call in stack.calls() if entry.takes and entry.name.startswith(stack_name)]
    mean_loss(stack, batch).backward()
    for hook in hooks:
        hook.remove()
    names = [point.name for point in points_of(plan)]
    unit = float(values["gradient_variance"][names.index(f"{stack_name}.0.ffn")])
    first = float(kept[f"{stack_name}.0"].grad.square().mean())
    for name, hidden in kept.items():
        index = names.index(f"{name}.ffn")
        x, gradient = hidden.detach().double(), hidden.grad.double()
        assert math.isclose(values["forward_second_moment"][index], float(x.square().mean()), rel_tol=1e-4)
        assert math.isclose(values["token_correlation"][index], overlap(x) / float(x.square().mean()), abs_tol=1e-4)
        assert math.isclose(values["gradient_variance"][index] / unit, float(gradient.square().mean()) / first, rel_tol=1e-3)
    assert values["gradient_variance"][-1] == pytest.approx(1.0)
    assert np.isfinite(values["forward_second_moment"]).all() and np.isfinite(values["gradient_variance"]).all()


def keep(kept: dict, name: str, hidden: torch.Tensor) -> None:
    hidden.retain_grad()
    kept[name] = hidden


def overlap(x: torch.Tensor) -> float:
    """Mean product of two different positions of a sequence, [s, b, h]."""
    s, b, h = x.shape
    products = torch.einsum("sbh,tbh->bst", x, x) / h
    return float((products.sum() - products.diagonal(dim1=1, dim2=2).sum()) / (b * s * (s - 1)))


def test_padding_is_left_out(small_data, make_stack):
    """What stands at padded positions changes no moment of the encoder."""
    config = make_config(small_data, shape_of("BartForConditionalGeneration"))
    stack, plan = make_stack(config)
    batch = samples_of(stack, config)
    batch["source_segments"][:, -6:] = 0
    other = {**batch, "source_tokens": batch["source_tokens"].clone()}
    other["source_tokens"][:, -6:] = 7
    assert not torch.equal(other["source_tokens"], batch["source_tokens"])
    first, second = (observed(stack, plan, one) for one in (batch, other))
    encoder = [index for index, point in enumerate(points_of(plan)) if point.stack == "encoder"]
    for quantity in ("forward_second_moment", "token_correlation", "gradient_variance", "angular_distance", "attention_entropy",
                     "attention_logit_max"):
        np.testing.assert_allclose(first.values()[quantity][encoder], second.values()[quantity][encoder], rtol=1e-4)


def scale_queries(stack, factor: float) -> None:
    for name, parameter in stack.canonical_parameters():
        if "linear_qkv" in name:
            rows = parameter.view(4, 3, 8, -1) if parameter.dim() == 2 else parameter.view(4, 3, 8)
            with torch.no_grad():
                rows[:, 0] *= factor


@pytest.mark.parametrize("factor, check", [
    (0.0, lambda entropy, top, variance: entropy.min() > 0.9999 and top.max() == 0.0 and variance.max() == 0.0),
    (1.0, lambda entropy, top, variance: 0.3 < entropy.min() < 0.99 and 0.0 < top.max() < 20.0),
    (300.0, lambda entropy, top, variance: entropy.max() < 0.3 and top.max() > 100.0),
])
def test_attention_by_head(factor, check: Callable, small_data, make_stack, tmp_path):
    config = small_data.config(tmp_path)
    stack, plan = make_stack(config)
    scale_queries(stack, factor)
    heads = observed(stack, plan, samples_of(stack, config)).heads()
    table = [np.array(list(heads[key].values())) for key in ("entropy", "logit_max", "logit_variance")]
    assert table[0].shape == (6, 4) and check(*table)


def test_logits_are_those_of_the_softmax(small_data, make_stack, tmp_path):
    """Against one layer's queries and keys by hand, causal."""
    config = small_data.config(tmp_path, model={"num_layers": 2, "position_embedding_type": "rope", "num_query_groups": 2})
    stack, plan = make_stack(config)
    kept = {}
    core = next(module for name, module in stack.named_modules() if name.endswith("core_attention"))
    handle = core.register_forward_pre_hook(lambda module, given: kept.update(query=given[0].detach().double(), key=given[1].detach().double()))
    seen = observed(stack, plan, samples_of(stack, config))
    handle.remove()
    query, key = kept["query"], kept["key"].repeat_interleave(2, dim=2)
    logits = torch.einsum("sbnd,tbnd->bnst", query, key) / math.sqrt(8)
    s = logits.size(-1)
    variance = [logits[..., row, :row + 1].var(dim=-1, unbiased=False) for row in range(1, s)]
    probabilities = [logits[..., row, :row + 1].softmax(-1) for row in range(1, s)]
    entropy = [-(p * p.log()).sum(-1) / math.log(p.size(-1)) for p in probabilities]
    name = "decoder.0.self_attention"
    np.testing.assert_allclose(seen.heads()["logit_variance"][name], torch.stack(variance).mean(dim=(0, 1)), rtol=1e-4)
    np.testing.assert_allclose(seen.heads()["entropy"][name], torch.stack(entropy).mean(dim=(0, 1)), rtol=1e-4)
    visible = torch.ones(s, s).tril().bool()
    np.testing.assert_allclose(seen.heads()["logit_max"][name], logits.masked_fill(~visible, -math.inf).amax(dim=(0, 2, 3)), rtol=1e-4)


def test_an_outlier_and_a_dead_unit_are_found(small_data, make_stack, tmp_path):
    config = small_data.config(tmp_path, model={"activation": "relu"})
    stack, plan = make_stack(config)
    parameters = dict(stack.canonical_parameters())
    with torch.no_grad():
        parameters["decoder.2.mlp.linear_fc2.bias"][5] = 40.0
        parameters["decoder.1.mlp.linear_fc1.bias"][:32] = -100.0
    seen = observed(stack, plan, samples_of(stack, config))
    names = [point.name for point in points_of(plan)]
    largest, mean = seen.coordinates()
    assert largest[names.index("decoder.2.ffn")].argmax() == 5 and mean[names.index("decoder.2.ffn")].argmax() == 5
    dead = seen.values()["dead_activations"]
    assert dead[names.index("decoder.1.ffn")] == pytest.approx(0.25, abs=0.03) and dead[names.index("decoder.0.ffn")] < 0.03


@pytest.mark.parametrize("scheme, norm_position", [("dslm", "pre"), ("vanilla", "pre"), ("layerscale", "pre")])
def test_a_skipped_layer_is_one_whose_branches_are_off(scheme, norm_position, small_data, make_stack, tmp_path):
    config = small_data.config(tmp_path, scheme={"name": scheme}, model={"norm_position": norm_position})
    stack, plan = make_stack(config)
    batch = samples_of(stack.eval(), config)
    counts = stack.task.counts(batch)

    def loss_of(output, batch):
        return sum(total / count for total, count in zip(stack.task.loss(output, batch), counts, strict=True))

    [found] = skip_losses(stack, plan, [Skip("decoder", 2, 2)], [batch], stack.definition.inputs_of, loss_of)
    with torch.inference_mode():
        whole = float(mean_loss(stack, batch))
        for index in (2, 3):
            layer = next(call for entry, call in stack.calls() if entry.name == f"decoder.{index}")
            for module in layer.modules():
                if isinstance(module, ResidualConnection):
                    module.register_forward_hook(branch_off)
        without = float(mean_loss(stack, batch))
    assert found.loss_increase == pytest.approx(without - whole, abs=1e-5) and abs(found.loss_increase) > 1e-6


def branch_off(module: ResidualConnection, arguments, add: Callable) -> Callable:
    def skip_only(branch_with_bias, residual, dropout):
        zero = torch.zeros_like(residual)
        return add((zero, None), residual, dropout)

    return skip_only


def test_a_thousand_layers_are_sampled():
    from megadsl.config.load import parse_config

    plan = plan_for_run(parse_config({"model": {"num_layers": 1000, "hidden_size": 64}}))
    skips = choose_skips(plan, 24)
    single = [skip.first for skip in skips if skip.count == 1]
    windows = [skip for skip in skips if skip.count > 1]
    assert len(single) == 24 and single[0] == 0 and single[-1] == 999 and len(windows) == 8
    assert windows[-1].first + windows[-1].count == 1000 and windows[0].count == 125
    few = choose_skips(plan_for_run(parse_config({"model": {"num_layers": 3}})), 24)
    assert [skip.first for skip in few if skip.count == 1] == [0, 1, 2]


@pytest.mark.parametrize("scheme, norm_position, family", [
    ("dslm", "pre", "decoder"), ("vanilla", "pre", "decoder"), ("xavier", "pre", "decoder"), ("dslm", "post", "decoder"),
    ("deepnorm", "post", "decoder"), ("dslm", "pre", "encoder"), ("xavier", "post", "encoder"), ("dslm", "pre", "encoder_decoder"),
])
def test_an_untrained_model_is_nearest_to_its_own_plan(scheme, norm_position, family, small_data, make_stack, tmp_path):
    model = {"num_layers": 12, "hidden_size": 64, "norm_position": norm_position, "family": family}
    config = small_data.config(tmp_path, scheme={"name": scheme}, model=model)
    stack, plan = make_stack(config)
    values = observed(stack, plan, samples_of(stack, config, 16)).values()
    plans, forward, gradient = candidates(config), values["forward_second_moment"], values["gradient_variance"]
    fits = fit_plans(plans, forward, gradient)
    # Two recipes of DeepScaleLM that differ in their weights alone have all but the same profile in Post-LN.
    alike = {"dslm", "dslm_paper"} if (scheme, norm_position) == ("dslm", "post") else {scheme}
    # Where the gradient falls from layer to layer (xavier Post-LN) one draw of the weights is farther from the mean that a plan is.
    largest = 0.7 if (scheme, norm_position) == ("xavier", "post") else 0.3
    own = next(fit for fit in fits if (fit.scheme, fit.folded) == (scheme, False))
    assert fits[0].scheme in alike and not fits[0].folded and own.error < largest, fits


def test_a_folded_model_is_nearest_to_its_folded_plan(small_data, make_stack, tmp_path):
    config = small_data.config(tmp_path, model={"num_layers": 12, "hidden_size": 64})
    stack, plan = make_stack(config)
    values = observed(stack, plan, samples_of(stack, config, 16)).values()
    scales = np.cumprod([1.0, *(sublayer.residual_scale for sublayer in plan.sublayers), 1.0]) ** 2
    fits = fit_plans(candidates(config), values["forward_second_moment"] / scales, values["gradient_variance"] * scales)
    assert (fits[0].scheme, fits[0].folded) == ("dslm", True), fits
