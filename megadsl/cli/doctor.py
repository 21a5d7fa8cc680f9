"""`megadsl doctor`: is this machine, or every node of this job, fit to train? One table, and exit code 1 where something is wrong.

Under srun, torchrun, deepspeed or mpirun each node checks itself, the ranks check what lies between them, and rank 0 speaks.
"""

from pathlib import Path

import typer


def doctor(folder: Path = typer.Option(Path("."), help="where runs will lie: its file system is checked")) -> None:
    """Check versions, devices, links between ranks, the file system, SLURM and DeepSpeed's ops; exit code 1: something is wrong."""
    from megadsl.parallel.checks.survey import survey
    from megadsl.parallel.launch import discover_launch

    launch = discover_launch()
    table = survey(launch, folder)
    if launch.rank == 0:
        _print(table)
    if any(finding.problem for _, finding in table):
        raise typer.Exit(1)


def _print(table: list[tuple[str, object]]) -> None:
    width = max(len(finding.topic) for _, finding in table)
    for where, finding in table:
        mark = "WRONG" if finding.problem else "ok"
        print(f"{mark:<6}{finding.topic:<{width}}  {finding.text}{f'  [{where}]' if where else ''}")
        if finding.problem:
            print(f"{'':<6}{'':<{width}}  -> {finding.problem}")
    wrong = sum(bool(finding.problem) for _, finding in table)
    print(f"{wrong} thing(s) to put right." if wrong else "Nothing is wrong.", flush=True)
