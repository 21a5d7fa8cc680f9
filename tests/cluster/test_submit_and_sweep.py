"""`megadsl slurm` on a real SLURM: a sweep from its command to its table, a job's state, and one run in a folder at a time."""

import re
import subprocess
import sys
from pathlib import Path

from jobs import ITERATIONS, losses
from test_preemption import LONG, submit

ROOT = Path(__file__).resolve().parents[2]


def megadsl(cluster, project: Path, *arguments: str) -> str:
    done = subprocess.run([sys.executable, "-m", "megadsl", "slurm", *arguments], cwd=project, capture_output=True, text=True, timeout=120,
                          env={**cluster.environment, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_sweep_of_three_learning_rates_gives_a_table(cluster, project):
    rates = ["1e-4", "3e-3", "1e-2"]
    shown = megadsl(cluster, project, "submit", "tiny.yaml", "training.run_dir=my sweep 100%j", "--sweep", f"optimizer.lr={','.join(rates)}",
                    "--time", "10")
    assert "#SBATCH --array=1-3" in shown and "#SBATCH --time=10" in shown
    job = re.search(r"submitted job (\d+)", shown)[1]
    for number in (1, 2, 3):
        ended = cluster.wait(f"{job}_{number}", project, log=f"my sweep 100%j/slurm-{job}_{number}.log")
        assert ended.state == "COMPLETED", ended.log
    header, *rows = megadsl(cluster, project, "collect", "my sweep 100%j").splitlines()
    assert header.split()[:3] == ["run", "optimizer.lr", "iteration"] and len(rows) == 3
    assert {row.split()[0]: float(row.split()[1]) for row in rows} == {f"run-{i}": float(rate) for i, rate in enumerate(rates, 1)}
    assert all(row.split()[2] == str(ITERATIONS) for row in rows)
    final = {number: sum(list(losses(project / f"my sweep 100%j/run-{number}").values())[-10:]) / 10 for number in (1, 2, 3)}
    best = min(final, key=final.get)
    assert rows[0].split()[0] == f"run-{best}" and f"{final[best]:.4f}" in rows[0] and rows[-1].split()[0] == "run-1"


def test_two_jobs_refuse_to_share_a_folder_and_status_tells_of_the_first(cluster, project):
    first = submit(cluster, project, "shared", LONG)
    cluster.wait_for_line(first, "iteration +4/", project)
    second = submit(cluster, project, "shared", LONG)
    refused = cluster.wait(second, project)
    assert refused.state == "FAILED" and f"SLURM job {first}" in refused.log and "is in use by" in refused.log, refused.log
    assert "Traceback" not in refused.log
    state, run = megadsl(cluster, project, "status", "shared").splitlines()
    assert state.startswith(f"job {first}: RUNNING") and "restarts 0; nodes n[0-1]" in state
    assert re.fullmatch(rf"iteration \d+/{LONG} \| loss \d\.\d+ \| [\d,]+ tokens/s \| ETA [\d:]+", run), run
    cluster.run("scancel", first)
    assert cluster.wait(first, project).state == "CANCELLED"
    assert megadsl(cluster, project, "status", "shared").startswith(f"job {first}: CANCELLED")
