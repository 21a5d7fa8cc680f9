"""What the loop calls to save and resume: every rank takes part, one of them commits, all of them learn how it ended.

A save is the same function in the foreground and, with checkpoint.async_save, in a thread: its collectives run on a gloo group
of their own, so they do not meet those of the training. The state's own collectives run in the foreground, before.
"""

import shutil
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from megadsl.checkpoint.lock import RunLock
from megadsl.checkpoint.manifest import CheckpointInfo, DamagedCheckpoint, damaged_files
from megadsl.checkpoint.store import Checkpoint, CheckpointStore, opened, write_small_files
from megadsl.checkpoint.weights import TensorReader, write_tensors
from megadsl.config import Config
from megadsl.errors import UserError
from megadsl.schemes.plan import SignalPlan
from megadsl.training.hang import Phase, Watch
from megadsl.training.preflight import Preflight, resume_point
from megadsl.training.state import EngineState

# Ranks may wait for the slowest disk, not for ever.
WRITE_TIMEOUT = timedelta(hours=2)


@dataclass(frozen=True)
class SaveResult:
    """How a save ended: the folder, or what went wrong (with the rank)."""

    iteration: int
    path: Path | None
    error: str | None


class Checkpointer:
    """Saves of one run. Made on all ranks together; holds the lock of the run's checkpoints until `close`.

    Raises:
        UserError: another run holds the lock.
    """

    def __init__(self, config: Config, log, watch: Watch):
        self.config, self.log, self.watch = config, log, watch
        self.store = CheckpointStore(Path(config.training.run_dir) / "checkpoints")
        self._rank = dist.get_rank()
        self._group = dist.new_group(backend="gloo", timeout=WRITE_TIMEOUT)
        self._thread: threading.Thread | None = None
        self._result: SaveResult | BaseException | None = None
        self._lock: RunLock | None = None
        self._take_lock()

    def _take_lock(self) -> None:
        problem = None
        if self._rank == 0:
            try:
                self._lock = RunLock(self.store.folder)
                self.store.remove_leftovers()
                if self._lock.note:
                    self.log(self._lock.note)
            except UserError as error:
                problem = str(error)
            except OSError as error:
                problem = f"{self.store.folder} cannot be written ({error.strerror}); free some space or choose another training.run_dir."
        problem = self.from_first_rank(problem)
        if problem:
            raise UserError(problem)

    def close(self) -> None:
        """Release the lock. A save in flight is waited for, without collectives of the main group (this may be an error path)."""
        if self._thread is not None:
            self._thread.join()
        if self._lock is not None:
            self._lock.release()

    def save(self, state: EngineState, info: CheckpointInfo, plan: SignalPlan, files: dict[str, bytes]) -> SaveResult | None:
        """Save on all ranks together; `files` are the task's. None: it goes on in the background, and `finished` or `wait` will tell."""
        with self.watch.during(Phase.SAVING):
            # Each tensor that is assembled is progress, and each that is written.
            tensors = self.watch.following(state.tensors(), Phase.SAVING)
            if not self.config.checkpoint.async_save:
                return self._write(tensors, info, plan, files)
            snapshot = list(tensors)

        def write() -> None:
            try:
                self._result = self._write(self.watch.following(snapshot, Phase.SAVING), info, plan, files)
            except BaseException as error:  # raised by `wait`, where a lost rank is a sentence
                self._result = error

        self._thread = threading.Thread(target=write, name="checkpoint", daemon=False)
        self._thread.start()
        return None

    def wait(self) -> SaveResult | None:
        """The result of the save in flight, once it is there; None without one. An error in its thread is raised here."""
        if self._thread is None:
            return None
        with self.watch.during(Phase.SAVING):
            self._thread.join()
        self._thread, result, self._result = None, self._result, None
        if isinstance(result, BaseException):
            raise result
        return result

    def finished(self) -> bool:
        """Whether `wait` would return a result at once on this rank."""
        return self._thread is not None and not self._thread.is_alive()

    def _write(self, tensors: Iterable[tuple[str, str, torch.Tensor]], info: CheckpointInfo, plan: SignalPlan,
               files: dict[str, bytes]) -> SaveResult:
        staging = self.store.staging(info.iteration)
        problem = self.from_first_rank(self._attempt(lambda: self.store.begin(info.iteration)) if self._rank == 0 else None)
        records, error = write_tensors(staging, f"rank-{self._rank:05d}", tensors if not problem else _drained(tensors))
        if self._rank == 0 and not problem and error is None:
            problem = self._attempt(lambda: records.update(write_small_files(staging, self.config, plan, files)))
        if error is not None:
            problem = f"rank {self._rank}: {error.strerror or error} ({error.filename or staging})"
        gathered = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, (records, problem), group=self._group)
        problems = [text for _, text in gathered if text]
        if self._rank == 0 and not problems:
            written = {name: record for own, _ in gathered for name, record in own.items()}
            problem = self._attempt(lambda: self._commit(info, written))
            problems = [problem] if problem else []
        problem = self.from_first_rank(problems[0] if problems else None)
        if problem:
            if self._rank == 0:
                shutil.rmtree(staging, ignore_errors=True)
            return SaveResult(info.iteration, None, problem)
        return SaveResult(info.iteration, self.store.path(info.iteration), None)

    def _commit(self, info: CheckpointInfo, files: dict) -> None:
        self.store.commit(info, files)
        self.store.prune(info.iteration, self.config.checkpoint.keep_last, self.config.checkpoint.keep_every)

    @staticmethod
    def _attempt(work) -> str | None:
        try:
            work()
        except OSError as error:
            return f"rank {dist.get_rank()}: {error.strerror or error} ({error.filename or 'no file named'})"
        return None

    def from_first_rank(self, value):
        """What rank 0 gives, on all ranks together."""
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self._group)
        return values[0]

    def resume(self, ready: Preflight) -> Checkpoint | None:
        """The checkpoint to resume from: preflight's choice, once it is verified by all ranks (each reads a part of the files).

        Falls back to the next older one, with a line that names what was wrong.
        """
        checkpoint, problems = ready.checkpoint, dict(ready.problems)
        while checkpoint is not None:
            wrong = self.verify(checkpoint)
            if wrong is None:
                break
            problems[checkpoint.path] = wrong
            checkpoint, problems = resume_point(ready.task, problems)
        for path, problem in problems.items():
            self.log(f"warning: {path} is not usable ({problem}); going back to {checkpoint.path if checkpoint else 'the start'}")
        return checkpoint

    def newest_until(self, iteration: int) -> Checkpoint | None:
        """The newest checkpoint of `iteration` or an earlier one that all ranks together find intact; None without one."""
        damaged: list[Path] = []
        while (path := self.from_first_rank(self._newest_until(iteration, damaged))) is not None:
            checkpoint = opened(path)
            wrong = self.verify(checkpoint)
            if wrong is None:
                return checkpoint
            self.log(f"warning: {path} is not usable ({wrong})")
            damaged.append(path)
        return None

    def _newest_until(self, iteration: int, excluded: list[Path]) -> Path | None:
        for checkpoint in reversed(self.store.complete() if self._rank == 0 else []):
            if checkpoint.info.iteration <= iteration and checkpoint.path not in excluded:
                try:
                    return opened(checkpoint.path).path
                except DamagedCheckpoint as error:
                    self.log(f"warning: {checkpoint.path} is not usable ({error})")
        return None

    def verify(self, checkpoint: Checkpoint) -> str | None:
        """What is wrong with a checkpoint's files, if anything; every rank reads a part of them and all get one answer."""
        world, wrong = dist.get_world_size(), {}
        if self.config.checkpoint.verify == "full":
            # Alternating by size, so that every rank reads about as much.
            files = sorted(checkpoint.manifest.files, key=lambda name: checkpoint.manifest.files[name].bytes)
            wrong = damaged_files(checkpoint.path, checkpoint.manifest, files[self._rank::world])
        gathered = [None] * world
        dist.all_gather_object(gathered, (str(checkpoint.path), next(iter(wrong.values()), None)), group=self._group)
        if len({path for path, _ in gathered}) > 1:
            raise UserError(f"Ranks see different checkpoints in {self.store.folder}; training.run_dir must be on a shared file system.")
        return next((problem for _, problem in gathered if problem), None)


def load_state(state: EngineState, checkpoint: Checkpoint) -> None:
    """Fill an engine from a checkpoint of any layout; call on all ranks."""
    info = checkpoint.info
    with TensorReader(checkpoint.path, checkpoint.manifest) as reader:
        state.load(reader, info.optimizer_steps, info.loss_scaler)


def _drained(tensors: Iterable) -> Iterable:
    """Take part in making the tensors, keep none."""
    for _ in tensors:
        continue
    return ()
