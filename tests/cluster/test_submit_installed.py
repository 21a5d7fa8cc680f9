"""`megadsl slurm submit` of an installed wheel, in an environment that nobody has activated and without a checkout in reach."""

import re

from jobs import ITERATIONS, losses
from installed import install_wheel


def test_a_wheel_submits_and_its_job_runs_in_its_environment(cluster, project, tmp_path):
    installed = install_wheel(tmp_path)
    shown = installed.run("megadsl", "slurm", "submit", "tiny.yaml", "training.run_dir=from-wheel", "--nodes", "2", "--time", "10",
                          cwd=project, environment=cluster.environment)
    job = re.search(r"submitted job (\d+)", shown)[1]
    ended = cluster.wait(job, project, log=f"from-wheel/slurm-{job}.log")
    assert ended.state == "COMPLETED" and ended.nodes == "n[0-1]", ended.log
    assert max(losses(project / "from-wheel")) == ITERATIONS
