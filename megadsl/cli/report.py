"""`megadsl report RUN` and `megadsl compare RUN_A RUN_B ...`: pages about runs, each one file."""

from pathlib import Path

import typer

from megadsl.cli.arguments import writing


def report(
    run: Path = typer.Argument(..., help="A run folder (training.run_dir)."),
    output: Path = typer.Option(None, help="HTML file to write. Default: RUN/report.html."),
) -> None:
    """One HTML page of a run: signal, curves, alarms, restarts, throughput, checkpoints, evaluation, configuration."""
    from megadsl.monitor.pages.run_data import RunData
    from megadsl.monitor.pages.run_report import run_report

    page, path = run_report(RunData.read(run)), output or run / "report.html"
    with writing(path):
        page.write(path)
    typer.echo(f"Report: {path}")


def compare(
    runs: list[Path] = typer.Argument(..., metavar="RUN_A RUN_B...", help="Run folders, two or more."),
    output: Path = typer.Option(Path("comparison.html"), help="HTML file to write."),
) -> None:
    """One HTML page of several runs: curves by tokens and by time, differences of configuration, profiles, final numbers."""
    from megadsl.monitor.pages.run_comparison import read_runs, run_comparison

    page = run_comparison(read_runs(runs))
    with writing(output):
        page.write(output)
    typer.echo(f"Comparison: {output}")
