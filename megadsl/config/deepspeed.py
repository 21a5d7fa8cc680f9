"""The DeepSpeed configuration of a run: keys that follow from our config are derived, the rest is read from ds_configs/."""

import json
from pathlib import Path

from megadsl.config.resources import shared_deepspeed_config
from megadsl.config.run import Config
from megadsl.errors import UserError


def deepspeed_config(config: Config, world_size: int) -> dict:
    """The dict for `deepspeed.initialize`.

    Raises:
        UserError: the JSON file is missing, broken, or sets a key that megadsl derives.
    """
    merged = _derived(config, world_size)
    path = _file(config)
    if path is not None:
        try:
            given = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"parallel.deepspeed_config {path} cannot be read: {error}.") from error
        _merge(merged, given, path, ())
    return merged


def _derived(config: Config, world_size: int) -> dict:
    training, parallel = config.training, config.parallel
    derived = {
        "train_micro_batch_size_per_gpu": training.micro_batch_size,
        "gradient_accumulation_steps": config.gradient_accumulation_steps(world_size),
        # DeepSpeed's default is 1.0, so "no clipping" must be written. At ZeRO 0 it does not report its norm: we clip.
        "gradient_clipping": config.optimizer.clip_grad if parallel.zero_stage else 0.0,
        "zero_optimization": {"stage": parallel.zero_stage},
        # The optimizer is torch's fused AdamW, made by us: no compiler runs at start.
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**62,
        "wall_clock_breakdown": False,
    }
    if training.precision != "fp32":
        derived[training.precision] = {"enabled": True}
    if training.precision == "bf16":
        # bf16 holds 8 bits: of 1,024 gradients of 1 it would add up 256, and a sum over ranks loses as much.
        derived |= {"data_types": {"grad_accum_dtype": "fp32"}, "communication_data_type": "fp32"}
    several_gradients = len(config.model.stack_layers) > 1 or config.model.position_embedding_type == "relative"
    if parallel.pipeline_model_parallel_size > 1 and several_gradients:
        # DeepSpeed can slice what it sends over tensor-parallel ranks, but only where one tensor of it has a gradient; an
        # encoder's memory and a relative bias have one too, beside the hidden state.
        derived["pipeline"] = {"pipe_partitioned": False, "grad_partitioned": False}
    return derived


def _file(config: Config) -> Path | None:
    name = config.parallel.deepspeed_config
    if name == "none":
        return None
    if name == "auto":
        name = "pipeline" if config.parallel.pipeline_model_parallel_size > 1 else f"zero{config.parallel.zero_stage}"
    return Path(name) if "/" in name or name.endswith(".json") else shared_deepspeed_config(name)


def _merge(target: dict, given: dict, path: Path, parents: tuple[str, ...]) -> None:
    for key, value in given.items():
        name = ".".join((*parents, key))
        if isinstance(value, dict) and isinstance(target.get(key, {}), dict):
            _merge(target.setdefault(key, {}), value, path, (*parents, key))
        elif key in target:
            raise UserError(f"{path} sets {name}, which megadsl derives from the run's config; remove it from the file.")
        else:
            target[key] = value
