"""megadsl slurm: the rendered script, the combinations of a sweep, and the table of its results. SLURM itself: tests/cluster."""

import json
import subprocess
from pathlib import Path

import pytest
from typer.testing import CliRunner

from megadsl.cli.slurm import app, render
from megadsl.config import save_config
from megadsl.config.resources import shared_folder
from megadsl.errors import UserError
from megadsl.monitor.progress import LogRecord
from megadsl.monitor.sweep import combinations


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
    assert combinations(["optimizer.lr=1e-3,3e-3", "training.seed=1,2"]) == [
        "optimizer.lr=1e-3 training.seed=1", "optimizer.lr=1e-3 training.seed=2", "optimizer.lr=3e-3 training.seed=1",
        "optimizer.lr=3e-3 training.seed=2"]
    for wrong in ("optimizer.lr", "optimizer.lr=1,,2", "optimizer.lr=1, 2"):
        with pytest.raises(UserError, match="not KEY=A,B,C"):
            combinations([wrong])


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


def test_status_says_which_tokens_and_the_time_left_of_the_log(tmp_path, small_data):
    """The time that is left is the log line's own: it does not depend on which tokens the rate counts."""
    save_config(small_data.config(tmp_path, training={"train_iters": 500}), tmp_path / "config.yaml")
    (tmp_path / "slurm.json").write_text('{"job": "1", "restarts": 2, "nodes": "n[0-1]"}')
    record = LogRecord(20, 500, 3.25, 1e-3, 0.5, 12345.6, 0.25, 1.5, 2**30, 7.5, 0)
    rows = [{"iteration": 20, "train/loss": 3.25}, {"iteration": 20, **record.scalars()}, {"iteration": 20, "validation/loss": 4.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"iteration": 21, "train/lo')
    job, run = CliRunner().invoke(app, ["status", str(tmp_path)]).stdout.splitlines()
    assert "restarts 2; nodes n[0-1]" in job
    assert run == "iteration 20/500 | loss 3.2500 | 12,346 tokens/s | ETA 1:00:00"
    assert "ETA 1:00:00" in record.text()
    (tmp_path / "metrics.jsonl").write_text("")
    assert CliRunner().invoke(app, ["status", str(tmp_path)]).stdout.splitlines()[1] == "no iteration is recorded yet"


def test_dry_run_writes_nothing(tmp_path, small_data):
    save_config(small_data.config(tmp_path / "run"), tmp_path / "config.yaml")
    shown = CliRunner().invoke(app, ["submit", str(tmp_path / "config.yaml"), "--nodes", "2", "--gpus-per-node", "4", "--dry-run"]).stdout
    assert "#SBATCH --nodes=2" in shown and "#SBATCH --ntasks-per-node=4" in shown and "--gpus-per-node=4" in shown
    assert not (tmp_path / "run").exists()


COMMANDS = [before + "touch ran" + after for before in ("\n", "\r\n", "\n#\n", "; ", "$(", "`", "' ; ", '" ; ', "\\\n", "\x0b", "x\n", "&& ", "| ",
                                                        "\u2028", "\x85", " #", "\n\n", "%j\n", "{", "\t") for after in ("", "\n")]


def fields(arguments: list[str]) -> tuple[int, str, str | None]:
    """(exit code, script, sentence) of a dry run."""
    done = CliRunner().invoke(app, ["submit", *arguments, "--dry-run"])
    return done.exit_code, done.stdout, str(done.exception) if isinstance(done.exception, UserError) else None


@pytest.mark.parametrize("option", ["training.run_dir", "--time", "--partition", "--account", "--sweep"])
def test_no_value_becomes_a_command(option, tmp_path, small_data):
    """200 values in all; what is accepted is run by bash with a srun that does nothing."""
    save_config(small_data.config(tmp_path / "run"), tmp_path / "config.yaml")
    (tmp_path / "bin").mkdir()
    for name in ("srun", "scontrol"):
        (tmp_path / "bin" / name).write_text("#!/bin/sh\n")
        (tmp_path / "bin" / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin", "SLURM_JOB_ID": "1", "SLURM_NNODES": "1", "SLURM_JOB_NODELIST": "n",
                   "SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_ARRAY_TASK_ID": "1"}
    refused, config = 0, str(tmp_path / "config.yaml")
    assert "control character" in fields([config, "training.seed=1\ntouch ran"])[2]
    for command in COMMANDS:
        value = {"training.run_dir": f"{tmp_path}/run{command}", "--sweep": f"optimizer.lr=1,2{command}"}.get(option, f"1{command}")
        arguments = [config, option, value]
        if option == "training.run_dir":
            save_config(small_data.config(Path(value)), tmp_path / "config.yaml")
            arguments = arguments[:1]
        code, script, sentence = fields(arguments)
        assert code == 0 or sentence and "\n" not in sentence, (value, code, sentence)
        refused += code != 0
        if code == 0:
            subprocess.run(["bash", "-c", script, "script", *arguments], env=environment, cwd=tmp_path, capture_output=True, timeout=20)
        assert not (tmp_path / "ran").exists(), value
        assert all(line.startswith("#") for line in script.splitlines() if "touch ran" in line), script
    assert refused == len(COMMANDS) or option in ("training.run_dir", "--sweep")


def test_a_run_folder_may_have_blanks_and_percents(tmp_path, small_data):
    save_config(small_data.config(tmp_path / "my run 50%j # 1"), tmp_path / "config.yaml")
    code, script, _ = fields([str(tmp_path / "config.yaml"), "--time", "1-12:00:00", "--partition", "gpu,long_2"])
    assert code == 0 and f'#SBATCH --output="{tmp_path}/my run 50%%j # 1/slurm-%j.log"' in script
    assert '#SBATCH --job-name="my run 50%j # 1"' in script and "--time=1-12:00:00" in script and "--partition=gpu,long_2" in script
