"""The plan of a run: its task says what enters the trunk and what its head asks of it, its scheme does the rest. Without torch."""

from typing import Literal

from megadsl.config import Config
from megadsl.schemes.assemble import profile_of
from megadsl.schemes.plan import SignalPlan
from megadsl.schemes.registry import build_parametrization, build_plan, scheme_of
from megadsl.tasks.registry import task_of
from megadsl.theory.profile import DepthProfile


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


def profile_for_run(config: Config, level: Literal["matrix", "scalar"]) -> DepthProfile:
    """The theory's DepthProfile of a configuration."""
    task = task_of(config)
    statistics = task.input_statistics()
    parametrization = build_parametrization(task.model, config.scheme, statistics.vocab_size)
    return profile_of(parametrization, task.model, statistics, statistics.vocab_size, level)
