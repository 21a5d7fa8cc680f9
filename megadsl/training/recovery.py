"""What a run does about an alarm: leave the step out, go back to a checkpoint and on with other data, or stop.

Only rank 0 judges; the others learn its verdict by one small all-reduce a step, and only where an action asks for more than a
line. Going back is recorded twice: in RUN/rollbacks.json at once, and in every checkpoint that follows. A run that resumes at an
iteration to which it went back reads on behind the samples that were left out, as it would have without the interruption.
"""

import json
from pathlib import Path

import torch
import torch.distributed as dist

from megadsl.checkpoint.manifest import CheckpointInfo
from megadsl.checkpoint.store import Checkpoint
from megadsl.config.alarms import AlarmsConfig
from megadsl.data.atomic_files import written_atomically
from megadsl.errors import UserError
from megadsl.monitor.alarms import Alarm, StepAlarms, severest
from megadsl.monitor.progress import Progress
from megadsl.monitor.signal import SignalHistory, SignalRecord, points_of
from megadsl.monitor.signal_alarms import SignalAlarms
from megadsl.monitor.writer import MetricsWriter
from megadsl.schemes.plan import SignalPlan
from megadsl.training.checkpointing import Checkpointer
from megadsl.training.engine import StepResult

_ALARMS, _ROLLBACKS, _SIGNAL = "alarms.jsonl", "rollbacks.json", "signal.jsonl"


class Recovery:
    """The alarms of one run and what follows from them. Made on all ranks.

    Args:
        plan: what the measured signal is compared with.
        info: of the checkpoint that the run resumes from; None: it begins.
        drawn: whether a run that begins draws its weights from the plan.
    """

    def __init__(self, options: AlarmsConfig, plan: SignalPlan, run_dir: Path, info: CheckpointInfo | None, device: torch.device,
                 is_main: bool, drawn: bool):
        self._options, self._plan, self._run_dir, self._device = options, plan, run_dir, device
        self._is_main, self._drawn = is_main, drawn
        self.rollbacks = _rollbacks(run_dir / _ROLLBACKS, info)
        if is_main and info is None:
            (run_dir / _ROLLBACKS).unlink(missing_ok=True)  # of another run, whose checkpoints are gone
        self._raised: list[Alarm] = []
        actions = set(options.actions.values())
        self._acts = bool({"rollback", "stop"} & actions)
        self.refuses = self._refuses if "skip" in actions else None
        self._begin(info)

    def _begin(self, info: CheckpointInfo | None) -> None:
        """As the alarms were after iteration `info.iteration`."""
        if not self._is_main:
            return
        iteration = info.iteration if info else -1
        self._steps = StepAlarms(self._options, info.alarms if info else {})
        self._signal = SignalAlarms(self._options, self._plan, points_of(self._plan), self._drawn)
        self._signal.replay(record for record in SignalHistory.read(self._run_dir / _SIGNAL).records if record.iteration < iteration)
        self._drop_alarms_after(iteration)

    def consumed_samples(self, info: CheckpointInfo) -> int:
        """Where a run that goes on from a checkpoint reads on: behind what was left out there."""
        return _behind(info, self.rollbacks)

    def state(self) -> dict:
        """What a checkpoint keeps of the alarms (it is rank 0 that writes it)."""
        return self._steps.state() if self._is_main else {}

    def _refuses(self, loss: float, gradient_norm: float) -> bool:
        return bool(self._from_first_rank(self._is_main and bool(self._steps.refuses(loss, gradient_norm))))

    def observe_step(self, iteration: int, result: StepResult, first_loss: float | None, progress: Progress,
                     writer: MetricsWriter | None) -> None:
        """Look at a step that has ended; iterations count from 1."""
        if self._is_main:
            self._say(self._steps.observe(iteration, result.loss, result.gradient_norm, first_loss, result.refused), progress, writer)

    def observe_signal(self, record: SignalRecord, progress: Progress, writer: MetricsWriter | None) -> None:
        """Look at what was measured; rank 0 alone has to call it."""
        if self._is_main:
            self._say(self._signal.observe(record), progress, writer)

    def _say(self, alarms: list[Alarm], progress: Progress, writer: MetricsWriter | None) -> None:
        self._raised += alarms
        for alarm in alarms:
            progress.log(alarm.line())
            if writer:
                writer.write_text("alarms", alarm.line(), alarm.iteration)
            with open(self._run_dir / _ALARMS, "a", encoding="utf-8") as file:
                file.write(json.dumps({**alarm.record(), "rollbacks": len(self.rollbacks)}) + "\n")

    def rollback_wanted(self, checkpointer: Checkpointer) -> int | None:
        """On all ranks together, after every step: until which iteration all was well, where the run shall go back; else None.

        Raises:
            UserError: it shall stop instead, or has gone back too often.
        """
        asking = [alarm for alarm in self._raised if alarm.action in ("rollback", "stop")]
        self._raised = []
        if not self._acts:
            return None
        alarm = severest(asking)
        verdict = self._from_first_rank(2 * max(0, min(one.fine for one in asking)) + (alarm.action == "stop") if alarm else -1)
        if verdict < 0:
            return None
        fine, stops = divmod(verdict, 2)
        sentence = f"An alarm stops the run: {alarm.name}, {alarm.text}" if alarm else "An alarm stops the run"
        if stops:
            raise UserError(f"{sentence} (monitor.alarms, action stop); {self._last_good(checkpointer, fine)}.")
        if len(self.rollbacks) >= self._options.max_rollbacks:
            raise UserError(
                f"{sentence}; the run has gone back {len(self.rollbacks)} times (monitor.alarms.max_rollbacks); lower optimizer.lr "
                f"or look at the data; {self._last_good(checkpointer, fine)}.")
        return fine

    def go_back(self, fine: int, consumed_samples: int, checkpointer: Checkpointer) -> Checkpoint:
        """Choose the last checkpoint up to iteration `fine`; record that what was read since, up to `consumed_samples`, is left out.

        On all ranks together. Newer checkpoints are removed: they hold what is gone back behind.

        Raises:
            UserError: there is no such checkpoint.
        """
        checkpoint = checkpointer.newest_until(fine)
        if checkpoint is None:
            raise UserError(
                f"An alarm asks to go back, but there is no checkpoint of iteration {fine} or an earlier one; set "
                "checkpoint.save_interval, or another action in monitor.alarms.")
        info = checkpoint.info
        if self._is_main:
            checkpointer.store.remove_after(info.iteration)
        self.rollbacks = [*self.rollbacks, [info.iteration, self.consumed_samples(info), consumed_samples]]
        if self._is_main:
            with written_atomically(self._run_dir / _ROLLBACKS) as temporary:
                temporary.write_text(json.dumps(self.rollbacks), encoding="utf-8")
        self._begin(info)
        return checkpoint

    def line(self) -> str:
        """The last time that the run went back, in words."""
        iteration, first, end = self.rollbacks[-1]
        return (f"went back to iteration {iteration}; samples {first} to {end - 1} are left out (rollback {len(self.rollbacks)} of at most "
                f"{self._options.max_rollbacks})")

    def _last_good(self, checkpointer: Checkpointer, fine: int) -> str:
        older = [checkpoint.path for checkpoint in checkpointer.store.complete() if checkpoint.info.iteration <= fine]
        return f"the last good checkpoint is {older[-1] if older else 'none: nothing was saved before it'}"

    def _from_first_rank(self, value: int) -> int:
        """Rank 0's value (from -1 on) on all ranks."""
        number = torch.tensor(value if self._is_main else -1, dtype=torch.int64, device=self._device)
        if dist.get_world_size() > 1:
            dist.all_reduce(number, op=dist.ReduceOp.MAX)
        return int(number)

    def _drop_alarms_after(self, iteration: int) -> None:
        """Alarms that will be raised again; those that made the run go back stay."""
        path = self._run_dir / _ALARMS
        if not path.exists():
            return
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        rows = [(json.loads(line), line) for line in lines if line.endswith("}\n")]
        kept = [line for row, line in rows if row["rollbacks"] < len(self.rollbacks) or row["iteration"] <= iteration]
        if kept != lines:
            path.write_text("".join(kept), encoding="utf-8")


def _rollbacks(path: Path, info: CheckpointInfo | None) -> list[list[int]]:
    """Those of the checkpoint, and those that led back to it since."""
    if info is None:
        return []
    try:
        written = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
        return info.rollbacks + [one for one in written if one not in info.rollbacks and one[0] <= info.iteration]
    except (OSError, ValueError, TypeError, IndexError) as error:
        raise UserError(f"{path} is damaged ({error!r}); remove it to resume without what it records.") from error


def _behind(info: CheckpointInfo, rollbacks: list[list[int]]) -> int:
    consumed = info.consumed_samples
    for iteration, first, end in rollbacks:
        if (iteration, first) == (info.iteration, consumed):
            consumed = end
    return consumed
