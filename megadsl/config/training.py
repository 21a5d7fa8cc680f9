"""Sections `optimizer`, `training`, `checkpoint` and `monitor`: how a run goes."""

from typing import Literal

from pydantic import Field, model_validator

from megadsl.config.alarms import AlarmsConfig
from megadsl.config.section import Section


class OptimizerConfig(Section):
    """AdamW, its learning-rate schedule and gradient clipping."""

    lr: float = Field(1e-3, gt=0, description="peak learning rate")
    min_lr: float = Field(0.0, ge=0, description="learning rate at the end of the decay")
    lr_decay_style: Literal["constant", "linear", "cosine", "wsd"] = "cosine"
    lr_warmup_iters: int = Field(0, ge=0, description="iterations of linear warm-up from 0")
    lr_warmup_fraction: float | None = Field(
        None, ge=0, lt=1, description="warm-up as a share of train_iters; lr_warmup_iters follows from it"
    )
    layer_lr_decay: float = Field(
        1.0, gt=0, le=1, description="factor on the learning rate from one layer to the one before it: the head has lr, the last layer lr times "
        "this, the embedding the least"
    )
    lr_decay_iters: int | None = Field(None, ge=1, description="iteration at which min_lr is reached (default: train_iters)")
    lr_wsd_decay_iters: int | None = Field(
        None, ge=1, description="length of the final decay of the wsd schedule (default: a tenth of lr_decay_iters)"
    )
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    adam_beta2: float = Field(0.95, ge=0, lt=1)
    adam_eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.1, ge=0, description="decoupled decay on matrices; norms, biases and embeddings have none")
    clip_grad: float = Field(1.0, ge=0, description="largest global gradient norm; 0: no clipping")
    qk_clip: bool = Field(False, description="after a step, scale queries and keys down where an attention score passed qk_clip_threshold")
    qk_clip_threshold: float = Field(100.0, gt=0, description="largest attention score (q k / sqrt(d)) that qk_clip leaves alone")
    qk_clip_alpha: float = Field(0.5, ge=0, le=1, description="share of qk_clip's factor, as an exponent, that the queries get; keys: the rest")

    @model_validator(mode="after")
    def _lr_order(self) -> "OptimizerConfig":
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr {self.min_lr} is larger than lr {self.lr}")
        return self


class TrainingConfig(Section):
    """Length, batch, precision and where the run is kept."""

    run_dir: str = Field("runs/default", description="folder of this run: checkpoints, TensorBoard, metrics.jsonl, plan")
    train_iters: int = Field(100, ge=1)
    train_epochs: float | None = Field(
        None, gt=0, description="passes over the training data, for tasks whose data are a list of samples; train_iters follows from it (null: "
        "train_iters says how long)"
    )
    freeze_layers: int = Field(
        0, ge=0, description="so many first layers and the embedding stay as they are (checkpoint.init_from); their gradients count as 0"
    )
    micro_batch_size: int = Field(1, ge=1, description="sequences per forward pass and rank")
    global_batch_size: int = Field(1, ge=1, description="sequences per optimizer step over all ranks")
    seed: int = Field(1234, ge=0)
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: cuda where there is one")
    deterministic: bool = Field(
        False, description="the same bits in every run on the same GPUs, by slower kernels (a CPU needs none)"
    )
    recompute: bool = Field(False, description="recompute every layer's activations in the backward pass")
    eval_interval: int = Field(100, ge=0, description="validate every so many iterations; 0: only at the end")
    eval_iters: int = Field(10, ge=0, description="global batches per validation; 0: no validation")
    hang_minutes: float = Field(
        8.0, ge=0, description="a step that takes longer, or validation or saving without progress for so long, ends the run, with the "
        "Python stack of every rank in RUN/stacks; 0: never"
    )
    max_skipped_iterations: int = Field(10, ge=1, description="stop after this many non-finite iterations in a row")


class CheckpointConfig(Section):
    """When checkpoints are written, how they are verified and how many are kept."""

    init_from: str | None = Field(
        None, description="a checkpoint or run folder whose weights a new run starts from, with a fresh optimizer at iteration 0; its "
        "task, head and sequence length may be others"
    )
    init_positions: Literal["interpolate", "fresh"] = Field(
        "interpolate", description="learned positions where init_from has fewer or more: stretched linearly, or kept as far as they go "
        "and the rest drawn",
    )
    allow_data_change: bool = Field(False, description="resume though data.datasets are not those that the checkpoint was trained with")
    save_interval: int = Field(0, ge=0, description="save every so many iterations; 0: only at the end")
    keep_last: int = Field(2, ge=1, description="older checkpoints are removed")
    keep_every: int = Field(0, ge=0, description="checkpoints of iterations that are multiples of this stay for ever; 0: none")
    async_save: bool = Field(
        False, description="copy the state to host memory and write it while training goes on; one save is in flight at most"
    )
    verify: Literal["full", "sizes"] = Field(
        "full", description="what is checked before resuming: full reads every file once and compares checksums"
    )
    on_save_error: Literal["continue", "stop"] = Field(
        "continue", description="what a failed save (a full disk) does to the run; older checkpoints stay in any case"
    )


class MonitorConfig(Section):
    """What is reported while the run goes."""

    log_interval: int = Field(10, ge=1, description="iterations between two log lines")
    signal_interval: int = Field(
        100, ge=0, description="measure the signal of every so many iterations, the first one always; it is written at log lines; 0: never"
    )
    tensorboard: bool = True
    figure_interval: int | None = Field(
        None, ge=0, description="iterations between two sets of pictures of the signal at least (default: a hundredth of train_iters); they "
        "are drawn beside training and take at most 0.5 % of the time; 0: none"
    )
    wandb: bool = Field(False, description="also show everything on Weights & Biases (package wandb; WANDB_MODE=offline sends nothing)")
    wandb_project: str = "megadsl"
    wandb_entity: str | None = Field(None, description="user or team on Weights & Biases (default: your own)")
    alarms: AlarmsConfig = Field(default_factory=AlarmsConfig)
