"""Section `monitor.alarms`: when a run is said to be in trouble, and what is done about it (docs/alarms.md).

A step's loss and gradient norm are known before the optimizer steps, so these two alarms can skip the step. What is found later (a
trend, a measured signal) leaves three ways: say it, go back to a checkpoint from before it, or stop.
"""

from typing import Literal

from pydantic import Field, model_validator

from megadsl.config.section import Section

StepAction = Literal["off", "warn", "skip", "rollback", "stop"]
LateAction = Literal["off", "warn", "rollback", "stop"]


class LossSpikeConfig(Section):
    """The loss of one step, against those of the steps before it."""

    threshold: float = Field(8.0, gt=0, description="robust standard deviations above the median of the last 16 steps")
    action: StepAction = "warn"


class GradientNormSpikeConfig(Section):
    """The gradient norm of one step before clipping, against those of the steps before it; in logarithms."""

    threshold: float = Field(10.0, gt=0, description="robust standard deviations of log(norm) above the median of the last 16 steps")
    action: StepAction = "warn"


class DivergenceConfig(Section):
    """The loss has come back to where the run began, and goes on rising."""

    threshold: float = Field(1.1, gt=1, description="median loss of the last 8 steps over the loss of the run's first step")
    action: LateAction = "warn"


class VarianceDriftConfig(Section):
    """The second moment of the residual stream: against the plan at step 0, later against what was measured at step 0."""

    plan_factor: float = Field(2.0, gt=1, description="measured over predicted at step 0, either way")
    threshold: float = Field(1000.0, gt=1, description="growth above what it was at step 0 (and above 1), or shrinkage below it")
    action: LateAction = "warn"


class GradientRatioConfig(Section):
    """Largest over smallest variance of the gradient at the residual stream, over the sublayers of a stack."""

    at_start: float = Field(30.0, gt=1, description="that ratio at step 0 (dslm: 2; xavier Post-LN at 96 layers: 41)")
    threshold: float = Field(1000.0, gt=1, description="that ratio later (a factor of 32 in the norm)")
    action: LateAction = "warn"


class EntropyCollapseConfig(Section):
    """Every head of an attention looks at one key."""

    threshold: float = Field(0.05, gt=0, lt=1, description="mean entropy of a layer's attention over its largest possible value, below")
    action: LateAction = "warn"


class LogitGrowthConfig(Section):
    """Attention logits that overflow the softmax into a hard choice."""

    threshold: float = Field(100.0, gt=0, description="largest attention logit of a layer, above")
    action: LateAction = "warn"


class DeadActivationsConfig(Section):
    """FFN units that no sampled token activates."""

    threshold: float = Field(0.9, gt=0, lt=1, description="their share in a layer, above")
    action: LateAction = "warn"


class UnusedLayersConfig(Section):
    """Layers whose output is their input."""

    threshold: float = Field(0.0005, gt=0, description="angle between a layer's input and output over pi, below")
    action: LateAction = "warn"


class UpdateRatioConfig(Section):
    """The optimizer's step over the weights that it changes, by parameter."""

    largest: float = Field(0.2, gt=0, description="root mean square of a step over that of the weights, above")
    smallest: float = Field(1e-4, ge=0, lt=1, description="the same over its median over all parameters, below: this one stands still")
    action: LateAction = "warn"


class AlarmsConfig(Section):
    """Alarms of a run; `off` is not looked for, `warn` only says it."""

    window: int = Field(64, ge=8, description="steps of the window that spikes are measured against")
    min_steps: int = Field(16, ge=8, description="steps that the window must hold before a spike is one")
    max_rollbacks: int = Field(3, ge=0, description="times that a run goes back; the next time it stops")
    loss_spike: LossSpikeConfig = Field(default_factory=LossSpikeConfig)
    gradient_norm_spike: GradientNormSpikeConfig = Field(default_factory=GradientNormSpikeConfig)
    divergence: DivergenceConfig = Field(default_factory=DivergenceConfig)
    variance_drift: VarianceDriftConfig = Field(default_factory=VarianceDriftConfig)
    gradient_ratio: GradientRatioConfig = Field(default_factory=GradientRatioConfig)
    entropy_collapse: EntropyCollapseConfig = Field(default_factory=EntropyCollapseConfig)
    logit_growth: LogitGrowthConfig = Field(default_factory=LogitGrowthConfig)
    dead_activations: DeadActivationsConfig = Field(default_factory=DeadActivationsConfig)
    unused_layers: UnusedLayersConfig = Field(default_factory=UnusedLayersConfig)
    update_ratio: UpdateRatioConfig = Field(default_factory=UpdateRatioConfig)

    @model_validator(mode="after")
    def _steps_fit(self) -> "AlarmsConfig":
        if self.min_steps > self.window:
            raise ValueError(f"min_steps {self.min_steps} is more than window {self.window}: no spike would ever be one")
        return self

    @property
    def actions(self) -> dict[str, str]:
        """By alarm, what follows from it."""
        return {
            "loss_spike": self.loss_spike.action, "gradient_norm_spike": self.gradient_norm_spike.action, "divergence": self.divergence.action,
            "variance_drift": self.variance_drift.action, "gradient_ratio": self.gradient_ratio.action,
            "entropy_collapse": self.entropy_collapse.action, "logit_growth": self.logit_growth.action,
            "dead_activations": self.dead_activations.action, "unused_layers": self.unused_layers.action,
            "update_ratio": self.update_ratio.action,
        }
