"""Everything that can be wrong with a run, checked in well under a second: before torch is loaded or a process group made."""

from dataclasses import dataclass, field, replace
from pathlib import Path

from megadsl.checkpoint.store import Checkpoint, CheckpointStore, open_checkpoint
from megadsl.config import Config
from megadsl.config.deepspeed import deepspeed_config
from megadsl.errors import UserError
from megadsl.monitor.wandb_run import check_wandb
from megadsl.parallel.launch import Launch, discover_launch
from megadsl.parallel.topology import Topology
from megadsl.schemes.plan import SignalPlan
from megadsl.tasks.length import require_length
from megadsl.tasks.planning import plan_for_run
from megadsl.tasks.registry import task_of
from megadsl.tasks.task import Task
from megadsl.training.signals import check_requeue

_DROPOUTS = ("hidden_dropout", "attention_dropout")
# What a run may have otherwise than the checkpoint whose trunk it starts from.
_OUTSIDE_OF_TRUNK = (*_DROPOUTS, "seq_length", "decoder_seq_length", "untie_embeddings_and_output_weights", "num_tokentypes")


@dataclass(frozen=True)
class Preflight:
    """What a run starts from."""

    launch: Launch
    topology: Topology
    task: Task
    checkpoint: Checkpoint | None
    plan: SignalPlan
    problems: dict[Path, str] = field(default_factory=dict)  # newer checkpoints that are not usable
    initial: Checkpoint | None = None  # whose weights a new run starts from


def preflight(config: Config) -> Preflight:
    """Check layout, batch sizes, task, data, DeepSpeed keys, scheme and an existing checkpoint; make the run folder.

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
    check_wandb(config.monitor)
    task = task_of(config)
    task.check()
    require_length(config, task.samples_per_epoch, task.name)
    checkpoint, problems = resume_point(task, {})
    initial = None if checkpoint else initial_weights(task)
    if checkpoint:
        plan = checkpoint.plan()
    else:
        plan = plan_for_run(config) if initial is None else plan_from(initial, task)
    try:
        Path(config.training.run_dir).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"training.run_dir {config.training.run_dir} cannot be made ({error.strerror}); choose another folder.") from error
    return Preflight(launch, topology, task, checkpoint, plan, problems, initial)


def resume_point(task: Task, excluded: dict[Path, str]) -> tuple[Checkpoint | None, dict[Path, str]]:
    """The newest usable checkpoint of the run folder, and what is wrong with the newer ones; `excluded` are known to be damaged.

    The layout (parallel.*) may change, and so may the batch sizes: the position is counted in samples, so the run goes on with
    the next one. What would make another model or another order of the data is refused.
    """
    checkpoint, problems = CheckpointStore(Path(task.config.training.run_dir) / "checkpoints").newest_usable(excluded)
    if checkpoint is not None:
        _check_same_run(task, checkpoint)
    return checkpoint, problems


def initial_weights(task: Task) -> Checkpoint | None:
    """The checkpoint of checkpoint.init_from, whose trunk must be this model's; data, head, task and hyper-parameters may differ."""
    config = task.config
    path = config.checkpoint.init_from
    if path is None:
        return None
    checkpoint = open_checkpoint(path, kind=None)
    theirs = checkpoint.info.tokenizer_sha256
    if task.tokenizer is not None and theirs not in (None, task.tokenizer.sha256):
        raise UserError(
            f"checkpoint.init_from {path} was trained with another tokenizer than {config.tokenizer.model}; set tokenizer.model="
            f"{checkpoint.tokenizer} and use datasets made with it."
        )
    saved = checkpoint.config()
    for section, free in (("model", _OUTSIDE_OF_TRUNK), ("scheme", ())):
        _same_section(section, config, saved, f"checkpoint.init_from {path}", "set it so", free)
    return checkpoint


def plan_from(initial: Checkpoint, task: Task) -> SignalPlan:
    """The plan of a run that starts from another's trunk: the trunk's numbers are those that its weights were trained under."""
    theirs, saved = initial.plan(), initial.config()
    same_head = task_of(saved).name == task.name and all(
        getattr(saved.model, key) == getattr(task.config.model, key) for key in _OUTSIDE_OF_TRUNK if key not in _DROPOUTS)
    if same_head:
        return theirs
    own = plan_for_run(task.config)
    stds = {**own.embedding.weight_std, **theirs.embedding.weight_std}
    return replace(
        own, norm_position=theirs.norm_position, sublayers=theirs.sublayers, role_factors=theirs.role_factors,
        embedding=replace(theirs.embedding, weight_std={role: stds[role] for role in own.embedding.weight_std}),
    )


def _check_same_run(task: Task, checkpoint: Checkpoint) -> None:
    newest, config, way_out = checkpoint.path, task.config, "set it back or choose another training.run_dir"
    saved = checkpoint.config()
    if saved.training.seed != config.training.seed:
        raise UserError(
            f"training.seed is {config.training.seed}, but {newest} was trained with {saved.training.seed}, which orders its data; {way_out}."
        )
    before = task_of(saved)
    if before.name != task.name:
        raise UserError(f"task.name is {task.name}, but {newest} was trained with {before.name}; {way_out}.")
    for key, value in before.options:
        if getattr(task.options, key) != value:
            raise UserError(f"task.{key} is {getattr(task.options, key)}, but {newest} was trained with {value}; {way_out}.")
    for section in ("model", "scheme", "tokenizer"):
        _same_section(section, config, saved, newest, way_out, ("model",) if section == "tokenizer" else ())
    if changed := data_change(task, checkpoint):
        if not config.checkpoint.allow_data_change:
            raise UserError(f"{changed}; {way_out}, or accept other data with checkpoint.allow_data_change=true.")


def data_change(task: Task, checkpoint: Checkpoint) -> str | None:
    """In which key the data differ from those that a checkpoint was trained with; None: they do not, or it does not say."""
    before, now = checkpoint.info.data_fingerprints, task.data_fingerprints()
    if before is None:
        return None
    for key in sorted({*before, *now}):
        if key not in now:
            return f"{key}, which {checkpoint.path} was trained with, is not there any more"
        if before.get(key) != now[key]:
            return f"{key} is not the data that {checkpoint.path} was trained with"
    return None


def _same_section(section: str, config: Config, saved: Config, path, way_out: str, free: tuple[str, ...]) -> None:
    """UserError at the first key of a section, `free` ones apart, in which the two configurations differ."""
    ours, theirs = getattr(config, section), getattr(saved, section)
    for key in type(ours).model_fields:
        if getattr(ours, key) != getattr(theirs, key) and key not in free:
            raise UserError(f"{section}.{key} is {getattr(ours, key)}, but {path} was trained with {getattr(theirs, key)}; {way_out}.")
