"""Everything that can be wrong with a run, checked in well under a second: before torch is loaded or a process group made."""

from dataclasses import dataclass
from pathlib import Path

from megadsl.checkpoint.store import Checkpoint, CheckpointStore, check_same_layout, open_checkpoint
from megadsl.config import Config
from megadsl.config.deepspeed import deepspeed_config
from megadsl.data.dataset import check_datasets
from megadsl.data.tokenizer import Tokenizer
from megadsl.errors import UserError
from megadsl.parallel.launch import Launch, discover_launch
from megadsl.parallel.topology import Topology
from megadsl.schemes.plan import SignalPlan
from megadsl.schemes.run import plan_for_run


@dataclass(frozen=True)
class Preflight:
    """What a run starts from."""

    launch: Launch
    topology: Topology
    tokenizer: Tokenizer
    checkpoint: Checkpoint | None
    plan: SignalPlan


def preflight(config: Config) -> Preflight:
    """Check layout, batch sizes, data, tokenizer, DeepSpeed keys, scheme and an existing checkpoint; make the run folder.

    Raises:
        UserError: the first thing that does not fit.
    """
    launch = discover_launch()
    topology = Topology(
        config.parallel.tensor_model_parallel_size, config.parallel.pipeline_model_parallel_size,
        config.data_parallel_size(launch.world_size),
    )
    deepspeed_config(config, launch.world_size)
    tokenizer = check_datasets(config)
    checkpoint = _checkpoint_to_resume(config, topology)
    plan = checkpoint.plan() if checkpoint else plan_for_run(config)
    try:
        Path(config.training.run_dir).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"training.run_dir {config.training.run_dir} cannot be made ({error.strerror}); choose another folder.") from error
    return Preflight(launch, topology, tokenizer, checkpoint, plan)


def _checkpoint_to_resume(config: Config, topology: Topology) -> Checkpoint | None:
    """The checkpoint to resume from, if the run folder has one that fits this config."""
    newest = CheckpointStore(Path(config.training.run_dir) / "checkpoints").latest()
    if newest is None:
        return None
    checkpoint = open_checkpoint(newest)
    check_same_layout(checkpoint, topology, config.parallel.zero_stage)
    saved = checkpoint.config()
    if saved.training.seed != config.training.seed:
        raise UserError(
            f"training.seed is {config.training.seed}, but {newest} was trained with {saved.training.seed}, which orders its data; "
            "set it back or choose another training.run_dir."
        )
    for section in ("model", "scheme", "tokenizer"):
        ours, theirs = getattr(config, section), getattr(saved, section)
        for key in type(ours).model_fields:
            if getattr(ours, key) != getattr(theirs, key) and (section, key) != ("tokenizer", "model"):
                raise UserError(
                    f"{section}.{key} is {getattr(ours, key)}, but {newest} was trained with {getattr(theirs, key)}; "
                    "set it back or choose another training.run_dir."
                )
    return checkpoint
