"""`megadsl slurm`: submit a run or a sweep, look at it, and collect a sweep's results; through sbatch, squeue and sacct."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import typer

from megadsl.cli.arguments import config_from_arguments, writing
from megadsl.config.resources import how_to_restore, shared_folder
from megadsl.errors import UserError
from megadsl.monitor.run_folder import progress_line
from megadsl.monitor.sweep import combinations, results

# What becomes a line of the script, in SLURM's own grammar.
_NAMES = (r"[\w.@-]+(,[\w.@-]+)*", "names of letters, digits, _ . @ and -, separated by commas")
_GRAMMAR = {
    "time": (r"(\d+-)?\d+(:\d{1,2}){0,2}|infinite|unlimited", "minutes or [DAYS-]HOURS:MINUTES:SECONDS, for example 1-12:00:00"),
    "partition": _NAMES, "account": _NAMES,
}

app = typer.Typer(help="Submit training to SLURM, watch it, collect a sweep.", no_args_is_help=True)


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
    for argument in [*arguments, init_from or ""]:
        if not argument.isprintable():
            raise UserError(f"The argument {argument!r} has a control character, which no key or value of a run needs; leave it away.")
    config = config_from_arguments(arguments)
    run_dir = Path(config.training.run_dir)
    _require_usable(str(run_dir), {"time": time, "partition": partition, "account": account})
    runs = combinations(sweep)
    options = {
        "nodes": nodes, "ntasks-per-node": tasks_per_node or max(1, gpus_per_node), "gpus-per-node": gpus_per_node or None,
        "cpus-per-task": cpus_per_task, "time": time, "partition": partition, "account": account,
        "job-name": run_dir.name, "output": f"{str(run_dir).replace('%', '%%')}/slurm-{'%A_%a' if sweep else '%j'}.log", "array": f"1-{len(runs)}" if sweep else None,
    }
    name = "sweep" if sweep else "finetune" if init_from else "train"
    script = render(shared_folder("slurm") / f"{name}.sbatch", options)
    words = [str(run_dir)] * bool(sweep) + [init_from] * bool(init_from) + arguments
    typer.echo(script)
    path = run_dir / f"{name}.sbatch"
    typer.echo(f"# sbatch {shlex.quote(str(path))} {shlex.join(words)}")
    if dry_run:
        return
    with writing(path):
        path.write_text(script, encoding="utf-8")
        if sweep:
            (run_dir / "sweep.txt").write_text("\n".join(runs) + "\n", encoding="utf-8")
    job = _slurm("sbatch", "--parsable", str(path), *words).strip().partition(";")[0]
    log = shlex.quote(f"{run_dir}/slurm-{job}{'_1' * bool(sweep)}.log")
    typer.echo(f"submitted job {job}; watch it with:\n  squeue --job {job}\n  tail -F {log}")
    typer.echo(f"  megadsl slurm {'collect' if sweep else 'status'} {shlex.quote(str(run_dir))}")


def _require_usable(run_dir: str, given: dict[str, str | None]) -> None:
    """UserError naming what cannot stand in a batch script: bash runs every line of it that a value could begin."""
    if not run_dir.isprintable() or set(run_dir) & set("\"'\\"):
        raise UserError(f"training.run_dir {run_dir!r} has a control character, a quotation mark or a backslash, which a batch script cannot "
                        "name; choose another folder.")
    for name, value in given.items():
        pattern, says = _GRAMMAR[name]
        if value is not None and not re.fullmatch(pattern, value, re.IGNORECASE):
            raise UserError(f"--{name} {value!r} is not what SLURM takes there: {says}.")


def render(template: Path, options: dict) -> str:
    """The template with `options` in place of its own #SBATCH lines of the same names; UserError where it is not there."""
    try:
        lines = template.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"{template} cannot be read ({error.strerror}); {how_to_restore(template.parent)}.") from error
    given = {name: value for name, value in options.items() if value is not None}
    own = [line for line in lines if not (line.startswith("#SBATCH --") and line[10:].partition("=")[0] in given)]
    first = next(index for index, line in enumerate(own) if line.startswith("#SBATCH"))
    own[first:first] = [f"#SBATCH --{name}={_word(str(value))}" for name, value in given.items()]
    # The script lies in the run folder; what it sources does not. The job runs in the environment that submits it.
    settings = [f"MEGADSL_SLURM={shlex.quote(str(template.parent))}"]
    if Path(sys.prefix, "bin", "activate").is_file():
        settings.append(f"MEGADSL_VENV=${{MEGADSL_VENV:-{shlex.quote(sys.prefix)}}}")
    start = own.index("set -euo pipefail") + 1
    own[start:start] = settings
    return "\n".join(own) + "\n"


def _word(value: str) -> str:
    """A value as sbatch reads it: in quotation marks where a blank would end it, or # begin a comment."""
    return value if re.fullmatch(r"[\w./:,@%=+-]+", value) else f'"{value}"'


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
    typer.echo(progress_line(run))


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
    table = results(sweep)
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in table:
        typer.echo("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())


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
