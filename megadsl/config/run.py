"""The whole configuration of a run, with the checks that need more than one section."""

from pydantic import Field, field_validator, model_validator

from megadsl.config.data import DataConfig, TokenizerConfig
from megadsl.config.model import ModelConfig, SchemeConfig
from megadsl.config.parallel import ParallelConfig
from megadsl.config.section import Section
from megadsl.config.task import TaskConfig
from megadsl.config.training import CheckpointConfig, MonitorConfig, OptimizerConfig, TrainingConfig
from megadsl.errors import UserError


class Config(Section):
    """All sections of one run."""

    model: ModelConfig = Field(default_factory=ModelConfig)
    scheme: SchemeConfig = Field(default_factory=SchemeConfig)
    task: TaskConfig = Field(default_factory=TaskConfig)
    parallel: ParallelConfig = Field(default_factory=ParallelConfig)
    tokenizer: TokenizerConfig = Field(default_factory=TokenizerConfig)
    data: DataConfig = Field(default_factory=DataConfig)
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    training: TrainingConfig = Field(default_factory=TrainingConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    monitor: MonitorConfig = Field(default_factory=MonitorConfig)

    @field_validator("scheme", mode="before")
    @classmethod
    def _scheme_name(cls, value):
        return {"name": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _layout_fits(self) -> "Config":
        model, parallel = self.model, self.parallel
        tensor, stages = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
        sizes = {
            "model.num_attention_heads": model.num_attention_heads,
            "model.num_query_groups": model.query_groups,
            "model.ffn_hidden_size": model.ffn_size,
            "tokenizer.make_vocab_size_divisible_by": self.tokenizer.make_vocab_size_divisible_by,
        }
        for key, size in sizes.items():
            if size % tensor:
                raise ValueError(f"{key} {size} is not divisible by parallel.tensor_model_parallel_size {tensor}")
        if self.optimizer.qk_clip and model.qk_layernorm:
            raise ValueError(
                "optimizer.qk_clip scales query and key weights, whose scale model.qk_layernorm takes away again; switch one of them off"
            )
        layers = sum(model.stack_layers.values())
        if layers < stages:
            raise ValueError(
                f"parallel.pipeline_model_parallel_size {stages} is more than the model's {layers} layers; use fewer stages"
            )
        if self.training.freeze_layers > layers:
            raise ValueError(f"training.freeze_layers {self.training.freeze_layers} is more than the model's {layers} layers")
        if stages > 1 and (self.training.freeze_layers or self.optimizer.layer_lr_decay != 1.0):
            # DeepSpeed adds up the norm of one parameter group after the other over the stages, which must all have the same ones.
            raise ValueError(
                "training.freeze_layers and optimizer.layer_lr_decay do not go with parallel.pipeline_model_parallel_size "
                f"{stages}, whose stages hold different layers; use tensor parallelism or ZeRO instead"
            )
        if self.training.precision != "fp32" and parallel.zero_stage == 0:
            raise ValueError(
                f"parallel.zero_stage 0 does not go with training.precision {self.training.precision} "
                "(DeepSpeed would clip with a wrong norm); set parallel.zero_stage=1"
            )
        return self

    def data_parallel_size(self, world_size: int) -> int:
        """Ranks that see different data, for `world_size` ranks; raises UserError where the layout does not fit."""
        parallel, batch = self.parallel, self.training
        if world_size % parallel.model_parallel_size:
            raise UserError(
                f"{world_size} processes cannot be divided into groups of parallel.tensor_model_parallel_size "
                f"{parallel.tensor_model_parallel_size} x parallel.pipeline_model_parallel_size "
                f"{parallel.pipeline_model_parallel_size}; start a multiple of {parallel.model_parallel_size} processes."
            )
        replicas = world_size // parallel.model_parallel_size
        if batch.global_batch_size % (batch.micro_batch_size * replicas):
            raise UserError(
                f"training.global_batch_size {batch.global_batch_size} is not divisible by training.micro_batch_size "
                f"{batch.micro_batch_size} x {replicas} data-parallel ranks; change one of them."
            )
        return replicas

    def gradient_accumulation_steps(self, world_size: int) -> int:
        """Micro-batches per rank and optimizer step."""
        return self.training.global_batch_size // (self.training.micro_batch_size * self.data_parallel_size(world_size))
