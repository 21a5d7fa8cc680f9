"""The plan of a run: its task says what enters the trunk and what its head asks of it, its scheme does the rest. Without torch."""

import math
from typing import Literal

from megadsl.config import Config
from megadsl.schemes.assemble import profile_of
from megadsl.schemes.plan import SignalPlan
from megadsl.schemes.registry import build_parametrization, build_plan, scheme_of
from megadsl.tasks.registry import task_of
from megadsl.theory.profile import DepthProfile
from megadsl.theory.softcap import capped_variance, passed_gradient


def plan_for_run(config: Config) -> SignalPlan:
    """The SignalPlan that training this configuration would use."""
    task = task_of(config)
    statistics = task.input_statistics()
    return build_plan(task.model, config.scheme, statistics, statistics.vocab_size)


def plan_for_comparison(config: Config, scheme: str) -> SignalPlan:
    """The SignalPlan of another scheme for a configuration, whose norms it moves where it needs to."""
    norm_position = scheme_of(scheme).norm_position or config.model.norm_position
    model = config.model.model_copy(update={"norm_position": norm_position})
    chosen = config.scheme.model_copy(update={"name": scheme})
    return plan_for_run(config.model_copy(update={"model": model, "scheme": chosen}))


def describe_remedies(config: Config, plan: SignalPlan) -> list[str]:
    """A line for each remedy against high attention scores or logits that changes a prediction of the plan."""
    task, lines = task_of(config), []
    model, size = task.model, float(task.model.hidden_size)
    variances = [1.0] if model.qk_layernorm else sorted(
        (size * sublayer.weight_std["query"] * sublayer.weight_std["key"] * sublayer.norm_scale ** 2) ** 2
        for sublayer in plan.sublayers if "query" in sublayer.weight_std
    )
    if model.qk_layernorm:
        lines.append("QK-norm: attention scores have variance 1, whatever the sigmas of query and key are")
    if cap := model.attention_logit_softcap:
        ends = [(one, capped_variance(one, cap), passed_gradient(one, cap)) for one in (variances[0], variances[-1])]
        spans = [" to ".join(dict.fromkeys(f"{value:.4g}" for value in pair)) for pair in zip(*ends, strict=True)]
        lines.append(f"soft cap {cap:g}: attention scores of variance {spans[0]} enter the softmax with {spans[1]}, and {spans[2]} of a "
                     "gradient's variance passes through the cap")
    statistics = task.input_statistics()
    if statistics.z_loss and statistics.gradient_correlation is None:
        std = plan.head.weight_std.get("output_head", plan.embedding.weight_std.get("word_embedding", 0.0))
        normalizer = math.log(statistics.vocab_size) + 0.5 * size * (std * plan.head.hidden_scale) ** 2
        lines.append(f"z-loss {statistics.z_loss:g}: logsumexp of the logits starts near {normalizer:.3g}, which adds "
                     f"{statistics.z_loss * normalizer ** 2:.3g} to the loss; every probability counts "
                     f"{1.0 + 2.0 * statistics.z_loss * normalizer:.5g} times in the gradient at the head")
    return lines


def profile_for_run(config: Config, level: Literal["matrix", "scalar"]) -> DepthProfile:
    """The theory's DepthProfile of a configuration."""
    task = task_of(config)
    statistics = task.input_statistics()
    parametrization = build_parametrization(task.model, config.scheme, statistics.vocab_size)
    return profile_of(parametrization, task.model, statistics, statistics.vocab_size, level)
