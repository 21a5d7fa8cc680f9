"""megadsl slurm: the rendered script, the combinations of a sweep, and the table of its results. SLURM itself: tests/cluster."""

import json
import subprocess

import pytest
from typer.testing import CliRunner

from megadsl.cli.slurm import app, render, sweep_lines
from megadsl.config import save_config
from megadsl.config.resources import shared_folder
from megadsl.errors import UserError


@pytest.mark.parametrize("name", sorted(path.name for path in shared_folder("slurm").glob("*.sbatch")))
def test_rendered_scripts_have_the_users_numbers_once(name, tmp_path):
    script = render(shared_folder("slurm") / name, {"nodes": 4, "job-name": "mine", "signal": "USR1@60", "time": None})
    options = [line.split()[1].partition("=") for line in script.splitlines() if line.startswith("#SBATCH")]
    assert len({key for key, *_ in options}) == len(options), "no option twice"
    values = {key: value for key, _, value in options}
    assert (values["--nodes"], values["--job-name"], values["--signal"]) == ("4", "mine", "USR1@60") and "--time" not in values
    assert "--requeue" in values and "--open-mode" in values
    first_command = next(index for index, line in enumerate(script.splitlines()) if line and not line.startswith("#"))
    assert all(not line.startswith("#SBATCH") for line in script.splitlines()[first_command:]), "sbatch stops reading at a command"
    (tmp_path / name).write_text(script)
    subprocess.run(["bash", "-n", tmp_path / name], check=True)


def test_a_sweep_is_every_combination():
    assert sweep_lines(["optimizer.lr=1e-3,3e-3", "training.seed=1,2"]) == [
        "optimizer.lr=1e-3 training.seed=1", "optimizer.lr=1e-3 training.seed=2", "optimizer.lr=3e-3 training.seed=1",
        "optimizer.lr=3e-3 training.seed=2"]
    for wrong in ("optimizer.lr", "optimizer.lr=1,,2", "optimizer.lr=1, 2"):
        with pytest.raises(UserError, match="not KEY=A,B,C"):
            sweep_lines([wrong])


def test_collect_puts_the_best_run_first(tmp_path, small_data):
    for number, (lr, loss) in enumerate([(1e-3, 4.0), (3e-3, 3.0), (1e-2, None)], 1):
        run = tmp_path / f"run-{number}"
        run.mkdir()
        save_config(small_data.config(run, optimizer={"lr": lr}), run / "config.yaml")
        records = [{"iteration": i, "train/loss": loss + 1 / i} for i in range(1, 21)] if loss else []
        text = "".join(json.dumps(record) + "\n" for record in records)
        (run / "metrics.jsonl").write_text(text + '{"iteration": 21, "train/lo')  # a line that is being written
    lines = CliRunner().invoke(app, ["collect", str(tmp_path)]).stdout.splitlines()
    assert lines[0].split() == ["run", "optimizer.lr", "iteration", "validation", "loss", "loss", "tokens/s"]
    assert [line.split()[:3] for line in lines[1:]] == [["run-2", "0.003", "20"], ["run-1", "0.001", "20"], ["run-3", "0.01", "0"]]
    last = sum(3.0 + 1 / i for i in range(11, 21)) / 10
    assert f"{last:.4f}" in lines[1]


def test_dry_run_writes_nothing(tmp_path, small_data):
    save_config(small_data.config(tmp_path / "run"), tmp_path / "config.yaml")
    shown = CliRunner().invoke(app, ["submit", str(tmp_path / "config.yaml"), "--nodes", "2", "--gpus-per-node", "4", "--dry-run"]).stdout
    assert "#SBATCH --nodes=2" in shown and "#SBATCH --ntasks-per-node=4" in shown and "--gpus-per-node=4" in shown
    assert not (tmp_path / "run").exists()
