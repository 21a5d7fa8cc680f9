"""What interrupts a run on a real SLURM: a warning, the time limit, its user, a dead rank. It goes on exactly, or ends with a reason."""

import json
import random
import re
import subprocess
import time
from pathlib import Path

from jobs import losses

ROOT = Path(__file__).resolve().parents[2]
SBATCH = str(ROOT / "slurm/train.sbatch")
LONG = 100_000  # iterations of a run that is not meant to end by itself


def submit(cluster, project: Path, run: str, iterations: int, *options: str, pipeline: int = 2) -> str:
    return cluster.submit(
        "-N", "2", "--ntasks-per-node=1", *options, SBATCH, "tiny.yaml", f"parallel.pipeline_model_parallel_size={pipeline}",
        f"training.run_dir={run}", f"training.train_iters={iterations}", "model.hidden_dropout=0.1", cwd=project,
    )


def checkpointed(project: Path, run: str) -> list[int]:
    return sorted(int(path.name.rpartition("-")[2]) for path in (project / run / "checkpoints").glob("iteration-*"))


def rank_process(run: str, rank: int) -> int:
    """The process id of a rank of a run, from its environment."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command, environment = (process / "cmdline").read_bytes(), (process / "environ").read_bytes()
        except OSError:
            continue
        if f"training.run_dir={run}\0".encode() in command and b"python" in command.split(b"\0")[0] and f"SLURM_PROCID={rank}\0".encode() in environment:
            return int(process.name)
    raise AssertionError(f"rank {rank} of {run} is not running")


def test_a_preempted_run_ends_where_an_undisturbed_one_does(cluster, project):
    """Warned at a random moment; requeued by itself; the curve is the undisturbed one bit for bit, with dropout on."""
    iterations = 120
    straight = submit(cluster, project, "straight", iterations)
    preempted = submit(cluster, project, "preempted", iterations)
    cluster.wait_for_line(preempted, rf"iteration +\d+/{iterations}", project)
    time.sleep(random.uniform(0, 0.7))
    cluster.run("scancel", "--signal=USR1", preempted)
    cluster.start_now(preempted)
    ended, undisturbed = cluster.wait(preempted, project), cluster.wait(straight, project)
    assert (ended.state, undisturbed.state) == ("COMPLETED", "COMPLETED"), ended.log
    assert "is requeued and goes on" in ended.log and 0 < int(re.search(r"resuming after iteration (\d+)", ended.log)[1]) < iterations
    assert f"job {preempted}, restart 1" in ended.log
    assert json.loads((project / "preempted/slurm.json").read_text())["restarts"] == 1
    curve = losses(project / "preempted")
    assert len(curve) == iterations and curve == losses(project / "straight")


def test_the_time_limit_and_then_scancel(cluster, project):
    """SLURM itself warns before the limit: saved and requeued. Cancelled by its user: saved, and not requeued."""
    # SLURM looks every 30 seconds and warns as soon as the next look would be too late: with 12, between 18 and 48 seconds after the
    # start. With 35 the warning may come before there is a process to hear it.
    job = submit(cluster, project, "limited", LONG, "--time=1", "--signal=USR1@12")
    cluster.wait_for_line(job, "is requeued and goes on", project, seconds=90)
    saved = checkpointed(project, "limited")
    assert len(saved) == 1
    cluster.start_now(job)
    cluster.wait_for_line(job, rf"(?s)resuming after iteration {saved[0]}.*iteration +\d+/{LONG}", project)
    cluster.run("scancel", job)
    ended = cluster.wait(job, project)
    assert ended.state == "CANCELLED" and "the run does not requeue it" in ended.log, ended.log
    assert checkpointed(project, "limited")[-1] > saved[0] + 1


def test_a_dead_rank_ends_the_job_at_once_with_a_reason(cluster, project):
    job = submit(cluster, project, "dead", LONG)
    cluster.wait_for_line(job, "iteration +4/", project)
    began = time.monotonic()
    subprocess.run(["kill", "-KILL", str(rank_process("dead", 1))], check=True)
    ended = cluster.wait(job, project)
    assert time.monotonic() - began < 20 and ended.state == "FAILED"
    assert "rank 0 has lost another rank" in ended.log and "task 1: Killed" in ended.log and "Traceback" not in ended.log, ended.log


def test_a_hung_rank_is_reported_with_the_stack_of_every_rank(cluster, project):
    """One rank is stopped (SIGSTOP): no rank can step. The one that still runs tells where it waits; continued, the other does too."""
    job = cluster.submit("-N", "2", "--ntasks-per-node=1", SBATCH, "tiny.yaml", "training.run_dir=hung", f"training.train_iters={LONG}",
                         "training.hang_minutes=0.05", cwd=project)
    cluster.wait_for_line(job, "iteration +4/", project)
    stopped = rank_process("hung", 1)
    subprocess.run(["kill", "-STOP", str(stopped)], check=True)
    cluster.wait_for_line(job, r"rank 0: no progress in a step for .* minutes \(training.hang_minutes\)", project)
    subprocess.run(["kill", "-CONT", str(stopped)], check=True)
    ended = cluster.wait(job, project)
    assert ended.state == "FAILED", ended.log
    for rank in (0, 1):
        stack = (project / f"hung/stacks/rank-{rank}.txt").read_text()
        assert "train_step" in stack or "loop.py" in stack, stack


def test_a_site_that_requeues_by_exit_code(cluster, project, monkeypatch):
    monkeypatch.setitem(cluster.environment, "MEGADSL_REQUEUE", "exit")
    job = submit(cluster, project, "by-exit", LONG, pipeline=1)
    cluster.wait_for_line(job, "iteration +4/", project)
    cluster.run("scancel", "--signal=USR1", job)
    ended = cluster.wait(job, project)
    assert ended.state == "FAILED" and "exit code 75 (MEGADSL_REQUEUE=exit)" in ended.log, ended.log
    assert "ExitCode=75:0" in cluster.run("scontrol", "show", "job", job) and len(checkpointed(project, "by-exit")) == 1
