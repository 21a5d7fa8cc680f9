"""Save, find, verify and prune the checkpoints of a run. Nothing here needs torch, so a run can be checked before it is loaded.

    RUN/checkpoints/iteration-0000100/
        manifest.json     all files with sizes and checksums, position, layout, library versions; written last
        config.yaml       the resolved configuration
        plan.json         the SignalPlan that the weights were drawn from
        tokenizer.model   the SentencePiece model, where the task has one, and other small files of the task
        weights/          full fp32 master weights by canonical name, in safetensors files of at most 1 GiB
        exp_avg/ exp_avg_sq/   Adam's moments, likewise
    RUN/checkpoints/latest   name of the newest complete folder

A checkpoint is written as .saving-0000100, every file fsynced by its writer, and renamed when it is complete: a folder
without a valid manifest does not exist for a reader.
"""

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megadsl.checkpoint.manifest import (
    CheckpointInfo, DamagedCheckpoint, FileRecord, Manifest, check_sizes, damaged_files, read_manifest, record_of, write_manifest,
)
from megadsl.config import Config, save_config
from megadsl.config.load import load_saved_config
from megadsl.data.atomic_files import written_atomically
from megadsl.errors import UserError
from megadsl.parallel.topology import Topology
from megadsl.schemes.plan import SignalPlan

SMALL_FILES = ("config.yaml", "plan.json")
STAGING, REMOVED = ".saving-", ".removed-"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk whose manifest is valid."""

    path: Path
    manifest: Manifest

    @property
    def info(self) -> CheckpointInfo:
        return self.manifest.info

    @property
    def topology(self) -> Topology:
        return Topology(self.info.tensor, self.info.pipeline, self.info.data)

    @property
    def tokenizer(self) -> Path:
        """Where the tokenizer is, if the task has one."""
        return self.path / "tokenizer.model"

    def task_files(self) -> dict[str, bytes]:
        """The small files of the task, by name."""
        names = [name for name in self.manifest.files if "/" not in name and name not in SMALL_FILES]
        return {name: (self.path / name).read_bytes() for name in names}

    def config(self) -> Config:
        return load_saved_config(self.path / "config.yaml")

    def plan(self) -> SignalPlan:
        path = self.path / "plan.json"
        try:
            return SignalPlan.from_json(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is damaged ({error!r}); use another checkpoint of this run.") from error


class CheckpointStore:
    """The checkpoints of one run."""

    def __init__(self, folder: Path):
        self.folder = Path(folder)

    def path(self, iteration: int) -> Path:
        return self.folder / f"iteration-{iteration:07d}"

    def staging(self, iteration: int) -> Path:
        return self.folder / f"{STAGING}{iteration:07d}"

    def begin(self, iteration: int) -> Path:
        """A fresh folder beside the final one, to be written into and then given to `commit` (one rank calls it)."""
        staging = self.staging(iteration)
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        return staging

    def commit(self, info: CheckpointInfo, files: dict[str, FileRecord]) -> Path:
        """Complete the folder of `begin`: manifest, directories on disk, rename, `latest` (one rank calls it)."""
        staging, final = self.staging(info.iteration), self.path(info.iteration)
        complete_folder(staging, info, files)
        if final.exists():  # a damaged one, which this run went back behind
            final.rename(self.folder / f"{REMOVED}{final.name}")
        staging.rename(final)
        self._name_latest(final)
        self.remove_leftovers()
        return final

    def _name_latest(self, folder: Path) -> None:
        with written_atomically(self.folder / "latest") as temporary:
            temporary.write_text(folder.name, encoding="utf-8")
            sync(temporary)
        sync(self.folder)

    def remove_after(self, iteration: int) -> None:
        """Remove what is newer than the checkpoint of `iteration`, the newest first (one rank calls it)."""
        for path in self.candidates():
            if path.name > self.path(iteration).name:
                path.rename(self.folder / f"{REMOVED}{path.name}")
        self._name_latest(self.path(iteration))
        self.remove_leftovers()

    def prune(self, newest: int, keep_last: int, keep_every: int) -> None:
        """Remove what is older than the last `keep_last` up to iteration `newest`, which is complete; multiples of
        `keep_every` stay. A folder disappears by rename first: it is never there in part."""
        older = [checkpoint for checkpoint in self.complete() if checkpoint.info.iteration <= newest]
        for checkpoint in older[:-keep_last]:
            if not keep_every or checkpoint.info.iteration % keep_every:
                checkpoint.path.rename(self.folder / f"{REMOVED}{checkpoint.path.name}")
        self.remove_leftovers()

    def remove_leftovers(self) -> None:
        """What a killed process left: folders that were never complete, or not any more."""
        for prefix in (STAGING, REMOVED):
            for folder in self.folder.glob(f"{prefix}*"):
                shutil.rmtree(folder, ignore_errors=True)

    def candidates(self) -> list[Path]:
        """Folders that could be checkpoints, newest first."""
        return sorted(self.folder.glob("iteration-*"), reverse=True)

    def complete(self) -> list[Checkpoint]:
        """Checkpoints with a valid manifest, oldest first; their files are not looked at."""
        return list(self._valid())[::-1]

    def latest(self) -> Checkpoint | None:
        """The newest one with a valid manifest."""
        return next(self._valid(), None)

    def _valid(self) -> Iterator[Checkpoint]:
        for path in self.candidates():
            try:
                yield Checkpoint(path, read_manifest(path))
            except DamagedCheckpoint:
                continue

    def newest_usable(self, excluded: dict[Path, str]) -> tuple[Checkpoint | None, dict[Path, str]]:
        """The newest checkpoint whose manifest, file sizes and small files are right, and {newer folder: what is wrong with it}.

        Raises:
            UserError: there are folders of checkpoints, but none is usable.
        """
        problems = dict(excluded)
        for path in self.candidates():
            if path in problems:
                continue
            try:
                return opened(path), problems
            except DamagedCheckpoint as error:
                problems[path] = str(error)
        if problems:
            reasons = "; ".join(f"{path.name}: {problem}" for path, problem in problems.items())
            raise UserError(f"No checkpoint in {self.folder} is complete ({reasons}); move the folder away to start anew.")
        return None, {}


def opened(path: Path) -> Checkpoint:
    """The checkpoint in exactly this folder; DamagedCheckpoint where its manifest, sizes or small files are wrong."""
    checkpoint = Checkpoint(path, read_manifest(path))
    check_sizes(path, checkpoint.manifest)
    absent = [name for name in SMALL_FILES if name not in checkpoint.manifest.files]
    if absent:
        raise DamagedCheckpoint(f"{absent[0]} is missing")
    wrong = damaged_files(path, checkpoint.manifest, [name for name in checkpoint.manifest.files if "/" not in name])
    if wrong:
        raise DamagedCheckpoint(next(iter(wrong.values())))
    return checkpoint


def open_checkpoint(path: str | os.PathLike, kind: str | None = "weights") -> Checkpoint:
    """Open a checkpoint folder, a run folder or a checkpoints folder (of those, the newest one), and verify what is read.

    `kind` names the tensors that the caller reads; None leaves their verification to the caller.

    Raises:
        UserError: there is no complete checkpoint, or a file of `kind` (the tensors that the caller reads) is damaged.
    """
    path = Path(path)
    candidates = [path] if path.name.startswith("iteration-") or (path / "manifest.json").exists() else [
        *CheckpointStore(path / "checkpoints").candidates(), *CheckpointStore(path).candidates()
    ]
    problems = []
    for candidate in candidates:
        try:
            checkpoint = opened(candidate)
            read = [name for name in checkpoint.manifest.files if kind and name.startswith(kind + "/")]
            wrong = damaged_files(candidate, checkpoint.manifest, read)
            if not wrong:
                return checkpoint
            problems.append(f"{candidate.name}: {next(iter(wrong.values()))}")
        except DamagedCheckpoint as error:
            problems.append(f"{candidate.name}: {error}")
    reasons = f" ({'; '.join(problems)})" if problems else ""
    raise UserError(f"There is no complete checkpoint in {path}{reasons}; give a run folder or one of its checkpoints/iteration-* folders.")


def write_small_files(folder: Path, config: Config, plan: SignalPlan, files: dict[str, bytes]) -> dict[str, FileRecord]:
    """config.yaml, plan.json and the `files` of the task (by name) of a checkpoint."""
    save_config(config, folder / "config.yaml")
    (folder / "plan.json").write_text(plan.to_json(), encoding="utf-8")
    for name, content in files.items():
        (folder / name).write_bytes(content)
    names = (*SMALL_FILES, *files)
    for name in names:
        sync(folder / name)
    return {name: record_of(folder / name) for name in names}


def complete_folder(folder: Path, info: CheckpointInfo, files: dict[str, FileRecord]) -> None:
    """Directories on disk, then the manifest."""
    for directory in {(folder / name).parent for name in files}:
        sync(directory)
    write_manifest(folder, Manifest(info, dict(sorted(files.items()))))
    sync(folder)


def sync(path: Path) -> None:
    """fsync a file or a directory."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
