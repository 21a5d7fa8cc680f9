"""`megadsl slurm`: submit a run or a sweep, look at it, and collect a sweep's results; through sbatch, squeue and sacct."""

import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import typer
import yaml

from megadsl.cli.arguments import config_from_arguments, writing
from megadsl.config.resources import how_to_restore, shared_folder
from megadsl.errors import UserError

app = typer.Typer(help="Submit training to SLURM, watch it, collect a sweep.", no_args_is_help=True)
_LAST_ITERATIONS = 10  # a run's loss in the table of a sweep: the mean over its last ones


@app.command()
def submit(
    arguments: list[str] = typer.Argument(..., metavar="CONFIG [KEY=VALUE]...", help="as for megadsl train"),
    nodes: int = typer.Option(1, min=1), tasks_per_node: int = typer.Option(None, min=1, help="default: one a GPU, else one"),
    gpus_per_node: int = typer.Option(0, min=0), cpus_per_task: int = typer.Option(None, min=1),
    time: str = typer.Option(None, help="time limit as SLURM writes it, for example 1-12:00:00"),
    partition: str = typer.Option(None), account: str = typer.Option(None),
    init_from: str = typer.Option(None, metavar="CHECKPOINT", help="fine-tune: start from the weights of this checkpoint"),
    sweep: list[str] = typer.Option([], metavar="KEY=A,B,C", help="one run for every combination; may be given several times"),
    dry_run: bool = typer.Option(False, "--dry-run", help="show the script, submit nothing"),
) -> None:
    """Render the batch script with these numbers into the run folder, show it, submit it."""
    if init_from and sweep:
        raise UserError("--init-from and --sweep do not go together; give checkpoint.init_from=CHECKPOINT as an override of the sweep.")
    config = config_from_arguments(arguments)
    run_dir = Path(config.training.run_dir)
    combinations = sweep_lines(sweep)
    options = {
        "nodes": nodes, "ntasks-per-node": tasks_per_node or max(1, gpus_per_node), "gpus-per-node": gpus_per_node or None,
        "cpus-per-task": cpus_per_task, "time": time, "partition": partition, "account": account,
        "job-name": run_dir.name, "output": f"{run_dir}/slurm-{'%A_%a' if sweep else '%j'}.log", "array": f"1-{len(combinations)}" if sweep else None,
    }
    name = "sweep" if sweep else "finetune" if init_from else "train"
    script = render(shared_folder("slurm") / f"{name}.sbatch", options)
    words = [str(run_dir)] * bool(sweep) + [init_from] * bool(init_from) + arguments
    typer.echo(script)
    path = run_dir / f"{name}.sbatch"
    typer.echo(f"# sbatch {path} {shlex.join(words)}")
    if dry_run:
        return
    with writing(path):
        path.write_text(script, encoding="utf-8")
        if sweep:
            (run_dir / "sweep.txt").write_text("\n".join(combinations) + "\n", encoding="utf-8")
    job = _slurm("sbatch", "--parsable", str(path), *words).strip().partition(";")[0]
    log = options["output"].replace("%j", job).replace("%A_%a", f"{job}_1")
    typer.echo(f"submitted job {job}; watch it with:\n  squeue --job {job}\n  tail -F {log}")
    typer.echo(f"  megadsl slurm {'collect' if sweep else 'status'} {run_dir}")


def render(template: Path, options: dict) -> str:
    """The template with `options` in place of its own #SBATCH lines of the same names; UserError where it is not there."""
    try:
        lines = template.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"{template} cannot be read ({error.strerror}); {how_to_restore(template.parent)}.") from error
    given = {name: value for name, value in options.items() if value is not None}
    own = [line for line in lines if not (line.startswith("#SBATCH --") and line[10:].partition("=")[0] in given)]
    first = next(index for index, line in enumerate(own) if line.startswith("#SBATCH"))
    own[first:first] = [f"#SBATCH --{name}={value}" for name, value in given.items()]
    # The script lies in the run folder; what it sources does not. The job runs in the environment that submits it.
    settings = [f"MEGADSL_SLURM={shlex.quote(str(template.parent))}"]
    if Path(sys.prefix, "bin", "activate").is_file():
        settings.append(f"MEGADSL_VENV=${{MEGADSL_VENV:-{shlex.quote(sys.prefix)}}}")
    start = own.index("set -euo pipefail") + 1
    own[start:start] = settings
    return "\n".join(own) + "\n"


def sweep_lines(sweep: list[str]) -> list[str]:
    """["lr=1,2", "seed=3,4"] -> one line of overrides for every combination."""
    axes = []
    for axis in sweep:
        key, equals, values = axis.partition("=")
        if not equals or not all(values.split(",")) or " " in axis:
            raise UserError(f"--sweep {axis} is not KEY=A,B,C, for example --sweep optimizer.lr=1e-3,3e-3.")
        axes.append([f"{key}={value}" for value in values.split(",")])
    return [" ".join(combination) for combination in itertools.product(*axes)]


@app.command()
def scripts() -> None:
    """The folder of the batch scripts, to copy and edit: cp -r "$(megadsl slurm scripts)" ."""
    typer.echo(shared_folder("slurm"))


@app.command()
def status(run: Path = typer.Argument(..., help="run folder")) -> None:
    """What SLURM says of the run's job, and what the run itself said last."""
    try:
        record = json.loads((run / "slurm.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{run} has no slurm.json: no job has started to train there yet (see squeue), or it is not a run folder.") from error
    job = record["job"]
    typer.echo(f"job {job}: {_job_state(job)}; restarts {record['restarts']}; nodes {record['nodes']}")
    metrics = _metrics(run)
    if not metrics:
        typer.echo("no iteration is recorded yet")
        return
    last = metrics[-1]
    total = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))["training"]["train_iters"]
    words = [f"iteration {last['iteration']}/{total}"]
    loss = _latest(metrics, "train/loss")
    words += [f"loss {loss:.4f}"] if loss is not None else []
    rate = _latest(metrics, "throughput/tokens_per_second")
    if rate:
        from megadsl.config import load_config
        from megadsl.monitor.progress import duration

        config = load_config(run / "config.yaml")
        tokens = (total - last["iteration"]) * config.training.global_batch_size * config.model.seq_length
        words += [f"{rate:,.0f} tokens/s", f"ETA {duration(tokens / rate)}"]
    typer.echo(" | ".join(words))


def _job_state(job: str) -> str:
    """squeue knows jobs that wait or run, scontrol those that ended minutes ago, sacct all, where there is accounting."""
    queued = _slurm("squeue", "--noheader", "--job", job, "--format=%T (%r), %M of %l", check=False).strip()
    if queued:
        return queued.splitlines()[0].replace(" (None)", "")
    shown = re.search(r"JobState=(\S+)", _slurm("scontrol", "show", "job", job, check=False))
    if shown:
        return shown[1]
    recorded = _slurm("sacct", "--noheader", "--allocations", "--job", job, "--format=State%20,Elapsed,ExitCode", check=False).split()
    return " ".join(recorded) if recorded else "no longer known to SLURM (no accounting here)"


@app.command()
def collect(sweep: Path = typer.Argument(..., metavar="SWEEP_DIR", help="folder that holds the run folders")) -> None:
    """One table of a sweep's runs: what they differ in, how far they are, their losses; the best first."""
    runs = sorted(path.parent for path in sweep.glob("*/config.yaml"))
    if not runs:
        raise UserError(f"{sweep} holds no run folder (with a config.yaml); has a run of the sweep started?")
    configs = [_flat(yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))) for run in runs]
    keys = [key for key in configs[0] if key != "training.run_dir" and len({str(config.get(key)) for config in configs}) > 1]
    rows = [[run.name, *(str(config.get(key)) for key in keys), *_results(run)] for run, config in zip(runs, configs, strict=True)]
    column = -3 if all(row[-3] != "-" for row in rows) else -2  # validation loss where all have it
    rows.sort(key=lambda row: float(row[column]) if row[column] != "-" else float("inf"))
    table = [["run", *keys, "iteration", "validation loss", "loss", "tokens/s"], *rows]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in table:
        typer.echo("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())


def _results(run: Path) -> list[str]:
    metrics = _metrics(run)
    losses = [record["train/loss"] for record in metrics if record.get("train/loss") is not None][-_LAST_ITERATIONS:]
    validation, rate = _latest(metrics, "validation/loss"), _latest(metrics, "throughput/tokens_per_second")
    return [
        str(metrics[-1]["iteration"] if metrics else 0), f"{validation:.4f}" if validation is not None else "-",
        f"{sum(losses) / len(losses):.4f}" if losses else "-", f"{rate:,.0f}" if rate else "-",
    ]


def _flat(values: dict, prefix: str = "") -> dict:
    flat = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def _metrics(run: Path) -> list[dict]:
    """metrics.jsonl; a last line that is being written is left out."""
    path = run / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}\n")]


def _latest(metrics: list[dict], key: str) -> float | None:
    return next((record[key] for record in reversed(metrics) if record.get(key) is not None), None)


def _slurm(program: str, *arguments: str, check: bool = True) -> str:
    if not shutil.which(program):
        if not check:
            return ""
        raise UserError(f"There is no {program} on this machine; submit from a login node, or see slurm/local_cluster.sh.")
    # Ranks of the submitting shell are not the job's.
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    done = subprocess.run([program, *arguments], capture_output=True, text=True, env=environment, timeout=120)
    if check and done.returncode:
        raise UserError(f"{program} refused: {' '.join(done.stderr.split())}")
    return done.stdout if done.returncode == 0 else ""
