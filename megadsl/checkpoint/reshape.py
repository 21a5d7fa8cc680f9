"""Checkpoints made from checkpoints, tensor by tensor: another cut into files (reshape), and the mean of several (average).

The form of a checkpoint does not depend on the layout, so any layout resumes from any checkpoint; reshaping only records a
layout, checks that the model fits it and cuts the files by its pipeline stages.
"""

import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from megadsl.checkpoint.manifest import CheckpointInfo, damaged_files, library_versions
from megadsl.checkpoint.store import Checkpoint, CheckpointStore, complete_folder, open_checkpoint, sync, write_small_files
from megadsl.checkpoint.weights import FILE_BYTES, KINDS, TensorReader, write_tensors
from megadsl.config import Config
from megadsl.config.load import parse_config
from megadsl.errors import UserError

if TYPE_CHECKING:
    from megadsl.model.stack import LayerEntry

Tensors = Iterable[tuple[str, str, torch.Tensor]]


def reshape(source: Path, output: Path, entries_of: "Callable[[Checkpoint, Config], list[LayerEntry]]", tensor: int, pipeline: int,
            zero_stage: int | None = None, file_bytes: int = FILE_BYTES) -> Path:
    """Copy a checkpoint into one recorded for `tensor` x `pipeline` parallelism; holds at most `file_bytes` of tensors in memory.

    Args:
        entries_of: the list of layers of a checkpoint under a configuration (a task knows it).
        zero_stage: None keeps the checkpoint's, or takes 1 where a pipeline needs it.
    """
    checkpoint = _intact(source)
    values = checkpoint.config().model_dump()
    zero = zero_stage if zero_stage is not None else (1 if pipeline > 1 else checkpoint.info.zero_stage)
    values["parallel"] |= {"tensor_model_parallel_size": tensor, "pipeline_model_parallel_size": pipeline, "zero_stage": zero}
    config = parse_config(values)
    info = replace(checkpoint.info, tensor=tensor, pipeline=pipeline, zero_stage=zero, versions=library_versions())
    with TensorReader(checkpoint.path, checkpoint.manifest) as reader:
        stages = _stages(checkpoint, pipeline, entries_of(checkpoint, config), reader.names("weights"))
        parts = {f"stage-{index:03d}": _copied(reader, names) for index, names in enumerate(stages)}
        return _write(output, checkpoint, config, info, parts, file_bytes)


def average(sources: list[Path], output: Path, file_bytes: int = FILE_BYTES) -> Path:
    """The mean of the weights of several checkpoints of one model, in fp32, without optimizer state."""
    checkpoints = [_intact(source, "weights") for source in sources]
    first = max(checkpoints, key=lambda checkpoint: checkpoint.info.iteration)
    for other in checkpoints:
        if other.info.tokenizer_sha256 != first.info.tokenizer_sha256:
            raise UserError(f"{other.path} and {first.path} have different tokenizers; average checkpoints of one run.")
    info = replace(first.info, loss=None, optimizer_steps=None, loss_scaler={}, versions=library_versions())
    with ExitStack() as stack:
        readers = [stack.enter_context(TensorReader(one.path, one.manifest)) for one in checkpoints]
        for reader in readers[1:]:
            _check_same_shapes(readers[0], reader)
        return _write(output, first, first.config(), info, {"mean": _means(readers)}, file_bytes)


def last_checkpoints(runs: list[Path], count: int) -> list[Path]:
    """Folders of the last `count` checkpoints of the run that is named; UserError where it has not so many."""
    if len(runs) != 1:
        raise UserError(f"--last takes the checkpoints of one run, but {len(runs)} paths are given; name the run's folder alone.")
    found = [checkpoint.path for checkpoint in CheckpointStore(runs[0] / "checkpoints").complete()]
    if len(found) < count:
        raise UserError(f"{runs[0]} has {len(found)} checkpoints, not {count}; lower --last, or train with checkpoint.keep_last={count}.")
    return found[-count:]


def _intact(source: Path, kind: str = "") -> Checkpoint:
    checkpoint = open_checkpoint(source, kind or "weights")
    if not kind:
        wrong = damaged_files(checkpoint.path, checkpoint.manifest)
        if wrong:
            raise UserError(f"{checkpoint.path} is damaged: {next(iter(wrong.values()))}; use another checkpoint of this run.")
    return checkpoint


def _stages(checkpoint: Checkpoint, size: int, entries: "list[LayerEntry]", names: list[str]) -> list[list[str]]:
    """Names of each of `size` pipeline stages, as training would cut the list of layers."""
    from megadsl.model.stack import stage_bounds  # takes seconds to import

    bounds = stage_bounds(entries, size)
    stage = {}
    for index in range(size):
        for entry in entries[bounds[index]:bounds[index + 1]]:
            stage.setdefault(entry.name, index)
    found: list[list[str]] = [[] for _ in range(size)]
    for name in names:
        prefix = name
        while prefix not in stage:
            prefix, dot, _ = prefix.rpartition(".")
            if not dot:
                raise UserError(f"{checkpoint.path} holds {name}, which its own config does not describe; use another checkpoint.")
        found[stage[prefix]].append(name)
    return found


def _copied(reader: TensorReader, names: list[str]) -> Iterator[tuple[str, str, torch.Tensor]]:
    for kind in KINDS:
        held = set(reader.names(kind))
        yield from ((kind, name, reader.tensor(kind, name)) for name in names if name in held)


def _check_same_shapes(first: TensorReader, other: TensorReader) -> None:
    for name in sorted({*first.names("weights"), *other.names("weights")}):
        shapes = [tuple(r.shape("weights", name)) if name in r.names("weights") else None for r in (first, other)]
        if shapes[0] != shapes[1]:
            raise UserError(f"{name} is {shapes[0]} in {first.folder} and {shapes[1]} in {other.folder}; these are different models.")


def _means(readers: list[TensorReader]) -> Iterator[tuple[str, str, torch.Tensor]]:
    for name in readers[0].names("weights"):
        total = readers[0].tensor("weights", name).clone()
        for reader in readers[1:]:
            total += reader.tensor("weights", name)
        yield "weights", name, total / len(readers)


def _write(output: Path, source: Checkpoint, config: Config, info: CheckpointInfo, parts: dict[str, Tensors], file_bytes: int) -> Path:
    """Write a complete checkpoint folder aside and rename it."""
    if output.exists():
        raise UserError(f"{output} exists already; choose another output.")
    staging = output.with_name(f".saving-{output.name}.{os.getpid()}")
    try:
        staging.mkdir(parents=True)
        files = write_small_files(staging, config, source.plan(), source.task_files())
        for part, tensors in parts.items():
            records, error = write_tensors(staging, part, tensors, file_bytes)
            if error is not None:
                raise error
            files |= records
        complete_folder(staging, info, files)
        staging.rename(output)
        sync(output.parent)
    except OSError as error:
        raise UserError(f"{output} cannot be written ({error.strerror or error}); free some space or choose another output.") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return output
