"""Stopping in good order: USR1 or TERM (a scheduler's warning) and Ctrl-C end a run after the step it is in, saved.

The ranks agree on that step by one all-reduce of an integer per iteration. A SLURM job then puts itself back into the queue.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from megadsl.errors import UserError

# Exit codes. 75 is EX_TEMPFAIL of sysexits.h: what a site may name as RequeueExit.
REQUEUE, INTERRUPT = 75, 130
_CODES = {signal.SIGUSR1: REQUEUE, signal.SIGTERM: REQUEUE, signal.SIGINT: INTERRUPT}
# A Ctrl-C reaches a rank from the terminal and from its launcher: within this time it is one.
_SAME_INTERRUPT_SECONDS = 1.0


class Stop:
    """Whether a run shall stop. `with Stop(...) as stop:` catches the signals; `agreed()` is asked by all ranks together."""

    def __init__(self):
        self.code = 0            # the exit code that was asked for; the same on all ranks once agreed() has said so
        self._asked = 0
        self._interrupted = 0.0
        self._previous = {}

    def __enter__(self) -> "Stop":
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._handle) for number in _CODES}
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame) -> None:
        now = time.monotonic()
        if number == signal.SIGINT:
            if self._interrupted and now - self._interrupted > _SAME_INTERRUPT_SECONDS:
                raise KeyboardInterrupt
            self._interrupted = self._interrupted or now
        self._asked = max(self._asked, _CODES[number])

    def agreed(self, device) -> bool:
        """Whether any rank was asked to stop; a collective, with the same answer on all ranks."""
        # Not at the top: the handlers are in place before torch, which takes seconds to load.
        import torch
        import torch.distributed as dist

        asked = torch.tensor(self._asked, dtype=torch.int32, device=device)
        if dist.get_world_size() > 1:
            dist.all_reduce(asked, op=dist.ReduceOp.MAX)
        self.code = int(asked)
        return self.code > 0

    def leave(self, is_main: bool) -> None:
        """Put the job back into the queue where that is what was asked for, and end this process; after everything is saved."""
        import torch.distributed as dist

        if is_main:
            print(self._requeue() if self.code == REQUEUE else "stopped; the same command goes on from here", flush=True)
        if dist.is_initialized():
            dist.barrier()  # srun may stop the others when one has ended
        sys.exit(self.code)

    @staticmethod
    def _requeue() -> str:
        job, way = os.environ.get("SLURM_JOB_ID"), os.environ.get("MEGADSL_REQUEUE", "scontrol")
        if not job:
            return f"stopped by a signal; the same command goes on from here (exit code {REQUEUE})"
        if way != "scontrol":
            return f"job {job} ends with exit code {REQUEUE} (MEGADSL_REQUEUE={way})"
        state = job_fields(job).get("JobState", "unknown")
        # A job that its user has cancelled stays so, and one that is being preempted is put back by SLURM itself.
        if state != "RUNNING":
            return f"SLURM itself ends job {job} ({state.lower()}); the run does not requeue it"
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, timeout=60)
        # Below zero: SLURM, requeueing the job, has already killed scontrol, which runs in it.
        if done.returncode > 0:
            return f"job {job} could not be requeued ({done.stderr.strip()}); submit it again to go on, or set MEGADSL_REQUEUE=exit"
        return f"job {job} is requeued and goes on from here"


def check_requeue() -> None:
    """UserError where MEGADSL_REQUEUE is not one of its values."""
    way = os.environ.get("MEGADSL_REQUEUE", "scontrol")
    if way not in ("scontrol", "exit"):
        raise UserError(f"MEGADSL_REQUEUE is '{way}'; it is scontrol (the run requeues itself) or exit (it ends with code {REQUEUE}).")


def job_fields(job: str) -> dict[str, str]:
    """What `scontrol show job` says; empty where it says nothing."""
    done = subprocess.run(["scontrol", "show", "job", job, "--oneliner"], capture_output=True, text=True, timeout=60)
    return dict(word.split("=", 1) for word in done.stdout.split() if "=" in word)


def record_job(run_dir: Path) -> str:
    """Note in RUN/slurm.json which job works on a run, for `megadsl slurm status`; gives the words for the log ("" without SLURM)."""
    job = os.environ.get("SLURM_JOB_ID")
    if not job:
        return ""
    restarts = int(os.environ.get("SLURM_RESTART_COUNT", 0))
    record = {"job": job, "restarts": restarts, "nodes": os.environ.get("SLURM_JOB_NODELIST", ""), "started": time.time()}
    (run_dir / "slurm.json").write_text(json.dumps(record) + "\n", encoding="utf-8")
    return f"job {job}, restart {restarts}"
