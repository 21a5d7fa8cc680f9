"""Everything that can be wrong with a run, checked in well under a second: before torch is loaded or a process group made."""

from dataclasses import dataclass, field
from pathlib import Path

from megadsl.checkpoint.store import Checkpoint, CheckpointStore, open_checkpoint
from megadsl.config import Config
from megadsl.config.deepspeed import deepspeed_config
from megadsl.data.dataset import check_datasets
from megadsl.data.tokenizer import Tokenizer
from megadsl.errors import UserError
from megadsl.parallel.launch import Launch, discover_launch
from megadsl.parallel.topology import Topology
from megadsl.schemes.plan import SignalPlan
from megadsl.schemes.run import plan_for_run
from megadsl.training.signals import check_requeue

_DROPOUTS = ("hidden_dropout", "attention_dropout")


@dataclass(frozen=True)
class Preflight:
    """What a run starts from."""

    launch: Launch
    topology: Topology
    tokenizer: Tokenizer
    checkpoint: Checkpoint | None
    plan: SignalPlan
    problems: dict[Path, str] = field(default_factory=dict)  # newer checkpoints that are not usable
    initial: Checkpoint | None = None  # whose weights a new run starts from


def preflight(config: Config) -> Preflight:
    """Check layout, batch sizes, data, tokenizer, DeepSpeed keys, scheme and an existing checkpoint; make the run folder.

    Raises:
        UserError: the first thing that does not fit.
    """
    launch = discover_launch()
    check_requeue()
    topology = Topology(
        config.parallel.tensor_model_parallel_size, config.parallel.pipeline_model_parallel_size,
        config.data_parallel_size(launch.world_size),
    )
    deepspeed_config(config, launch.world_size)
    tokenizer = check_datasets(config)
    checkpoint, problems = resume_point(config, {})
    initial = None if checkpoint else initial_weights(config, tokenizer)
    source = checkpoint or initial
    plan = source.plan() if source else plan_for_run(config)
    try:
        Path(config.training.run_dir).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"training.run_dir {config.training.run_dir} cannot be made ({error.strerror}); choose another folder.") from error
    return Preflight(launch, topology, tokenizer, checkpoint, plan, problems, initial)


def resume_point(config: Config, excluded: dict[Path, str]) -> tuple[Checkpoint | None, dict[Path, str]]:
    """The newest usable checkpoint of the run folder, and what is wrong with the newer ones; `excluded` are known to be damaged.

    The layout (parallel.*) may change, and so may the batch sizes: the position is counted in samples, so the run goes on with
    the next one. What would make another model or another order of the data is refused.
    """
    checkpoint, problems = CheckpointStore(Path(config.training.run_dir) / "checkpoints").newest_usable(excluded)
    if checkpoint is not None:
        _check_same_run(config, checkpoint)
    return checkpoint, problems


def initial_weights(config: Config, tokenizer: Tokenizer) -> Checkpoint | None:
    """The checkpoint of checkpoint.init_from, which must be of this model and tokenizer; data and hyper-parameters may differ."""
    path = config.checkpoint.init_from
    if path is None:
        return None
    checkpoint = open_checkpoint(path, kind=None)
    if checkpoint.info.tokenizer_sha256 != tokenizer.sha256:
        raise UserError(
            f"checkpoint.init_from {path} was trained with another tokenizer than {config.tokenizer.model}; set tokenizer.model="
            f"{checkpoint.tokenizer} and use datasets made with it."
        )
    saved = checkpoint.config()
    for section in ("model", "scheme"):
        _same_section(section, config, saved, f"checkpoint.init_from {path}", "set it so", _DROPOUTS)
    return checkpoint


def _check_same_run(config: Config, checkpoint: Checkpoint) -> None:
    newest = checkpoint.path
    saved = checkpoint.config()
    if saved.training.seed != config.training.seed:
        raise UserError(
            f"training.seed is {config.training.seed}, but {newest} was trained with {saved.training.seed}, which orders its data; "
            "set it back or choose another training.run_dir."
        )
    for section in ("model", "scheme", "tokenizer"):
        way_out = "set it back or choose another training.run_dir"
        _same_section(section, config, saved, newest, way_out, ("model",) if section == "tokenizer" else ())


def _same_section(section: str, config: Config, saved: Config, path, way_out: str, free: tuple[str, ...]) -> None:
    """UserError at the first key of a section, `free` ones apart, in which the two configurations differ."""
    ours, theirs = getattr(config, section), getattr(saved, section)
    for key in type(ours).model_fields:
        if getattr(ours, key) != getattr(theirs, key) and key not in free:
            raise UserError(f"{section}.{key} is {getattr(ours, key)}, but {path} was trained with {getattr(theirs, key)}; {way_out}.")
