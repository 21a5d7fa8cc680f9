"""Section `parallel`: how a run is laid out over devices. Everything here is checked before a process group exists."""

from typing import Literal

from pydantic import Field, model_validator

from megadsl.config.section import Section


class ParallelConfig(Section):
    """Layout. Data parallelism is what is left: world size / (tensor * pipeline)."""

    tensor_model_parallel_size: int = Field(1, ge=1, description="ranks that share every matrix")
    pipeline_model_parallel_size: int = Field(1, ge=1, description="stages that share the list of layers")
    zero_stage: Literal[0, 1, 2, 3] = Field(1, description="DeepSpeed ZeRO stage; a pipeline needs exactly 1")
    deepspeed_config: str = Field(
        "auto",
        description="JSON with DeepSpeed keys that cannot be derived, or the name of one that comes along (zero3_offload); "
        "auto: the file of ds_configs/ for this layout; none: nothing but the derived keys",
    )
    timeout_minutes: float = Field(10.0, gt=0, description="a collective that takes longer ends the run")

    @property
    def model_parallel_size(self) -> int:
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size

    @model_validator(mode="after")
    def _pipeline_needs_zero_1(self) -> "ParallelConfig":
        # ZeRO 0 clips with a wrong norm under a pipeline and DeepSpeed refuses 2 and 3 (FACTS.md, section 3).
        if self.pipeline_model_parallel_size > 1 and self.zero_stage != 1:
            raise ValueError(
                f"zero_stage {self.zero_stage} does not go with pipeline_model_parallel_size "
                f"{self.pipeline_model_parallel_size}; set parallel.zero_stage=1"
            )
        return self
