"""slurm/train.sbatch on a real two-node SLURM: a run over two nodes, a bad config, and two jobs side by side."""

import math
import re
import subprocess
import time
from pathlib import Path

import pytest
from jobs import ITERATIONS, losses

ROOT = Path(__file__).resolve().parents[2]
SBATCH = str(ROOT / "slurm/train.sbatch")


@pytest.mark.parametrize("script", sorted(path.name for path in (ROOT / "slurm").iterdir() if path.suffix in (".sh", ".sbatch", ".env")))
def test_scripts_parse(script):
    subprocess.run(["bash", "-n", str(ROOT / "slurm" / script)], check=True)


def test_two_nodes_train_a_pipeline(cluster, project):
    job = cluster.submit("-N", "2", "--ntasks-per-node=1", SBATCH, "tiny.yaml", "parallel.pipeline_model_parallel_size=2", cwd=project)
    ended = cluster.wait(job, project)
    assert ended.state == "COMPLETED", ended.log
    assert ended.nodes == "n[0-1]"
    assert set(re.findall(r"task (\d) runs on (\w+)", ended.log)) == {("0", "n0"), ("1", "n1")}
    curve = losses(project / "run")
    assert sorted(curve) == list(range(1, ITERATIONS + 1))
    assert all(map(math.isfinite, curve.values()))
    assert sum(curve[i] for i in range(ITERATIONS - 2, ITERATIONS + 1)) / 3 < sum(curve[i] for i in (1, 2, 3)) / 3 - 0.2, curve


def test_two_jobs_run_side_by_side(cluster, project):
    """Two data-parallel jobs of one CPU a node, from one folder; the ports they meet at are told apart by the job id.

    The first gets USR1 as --signal would send it: that must not kill a task that has no handler for it (yet).
    """
    jobs = [
        cluster.submit("-N", "2", "--ntasks-per-node=1", SBATCH, "tiny.yaml", f"training.run_dir=run-{i}", f"training.seed={i}",
                       cwd=project) for i in (1, 2)
    ]
    log, deadline = project / f"{jobs[0]}.log", time.monotonic() + 30
    while not (log.exists() and "runs on n1" in log.read_text()):
        assert time.monotonic() < deadline, f"job {jobs[0]} did not start"
        time.sleep(0.1)
    cluster.run("scancel", "--signal=USR1", jobs[0])
    assert cluster.run("squeue", "--noheader", "--states=RUNNING").count(" R ") == 2, "they do not run at the same time"
    ended = [cluster.wait(job, project) for job in jobs]
    assert [one.state for one in ended] == ["COMPLETED"] * 2, "\n".join(one.log for one in ended)
    first, second = losses(project / "run-1"), losses(project / "run-2")
    assert sorted(first) == sorted(second) == list(range(1, ITERATIONS + 1))
    assert first != second


def test_a_bad_config_fails_the_job_with_a_sentence(cluster, project):
    job = cluster.submit("-N", "2", "--ntasks-per-node=1", SBATCH, "tiny.yaml", "model.num_layer=4", cwd=project)
    ended = cluster.wait(job, project)
    assert ended.state == "FAILED"
    assert "model.num_layer" in ended.log and "Traceback" not in ended.log, ended.log
