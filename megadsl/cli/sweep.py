"""`megadsl sweep CONFIG ... --sweep KEY=A,B`: train and evaluate the runs of a sweep one after the other on this machine, and say what
came out, as mean and deviation over the seeds. On a cluster: megadsl slurm submit --sweep."""

import subprocess
import sys
from pathlib import Path
from typing import Literal

import typer

from megadsl.cli.arguments import config_from_arguments
from megadsl.errors import UserError
from megadsl.monitor.sweep import combinations, read_lines, table_over_seeds

EVALUATION = "evaluation.json"


def sweep(
    arguments: list[str] = typer.Argument(..., metavar="CONFIG [KEY=VALUE]...", help="as for megadsl train"),
    sweep: list[str] = typer.Option([], metavar="KEY=A,B,C", help="one run for every combination; may be given several times"),
    runs: Path = typer.Option(None, metavar="FILE", help="a line of overrides for every run instead, such as slurm/finetune-grid.txt"),
    split: Literal["train", "validation", "test"] = typer.Option("validation", help="what every run is evaluated on"),
    processes: int = typer.Option(1, min=1, help="processes of a run (torchrun)"),
) -> None:
    """Runs lie in training.run_dir/run-N. A run that is complete is not trained again, so a sweep that was interrupted goes on.

    Example: megadsl sweep configs/finetune-sentiment.yaml --sweep training.seed=1,2,3,4,5
    """
    if bool(sweep) == (runs is not None):
        raise UserError("Give the runs of the sweep either by --sweep KEY=A,B,C or by --runs FILE.")
    folder = Path(config_from_arguments(arguments).training.run_dir)
    lines = read_lines(runs) if runs else combinations(sweep)
    launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}"] if processes > 1 else []
    for number, line in enumerate(lines, start=1):
        run = folder / f"run-{number}"
        typer.echo(f"--- run {number} of {len(lines)}: {line}")
        _megadsl(launcher, "train", *arguments, *line.split(), f"training.run_dir={run}")
        _megadsl([], "evaluate", str(run), "--split", split, "--output", str(run / EVALUATION))
    typer.echo(f"--- {split} split, mean ± standard deviation over seeds")
    for row in table_over_seeds([(line, folder / f"run-{number}" / EVALUATION) for number, line in enumerate(lines, start=1)]):
        typer.echo(row)


def _megadsl(launcher: list[str], *words: str) -> None:
    code = subprocess.run([sys.executable, *launcher, "-m", "megadsl", *words]).returncode
    if code:
        raise UserError(f"megadsl {' '.join(words)} ended with code {code}; the sweep stops here, and goes on from here when it is started again.")
