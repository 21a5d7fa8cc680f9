"""`megadsl checkpoint`: inspect, compare, average and reshape checkpoints; export and import stand in checkpoint_export.py."""

import json
from dataclasses import asdict
from pathlib import Path

import typer

from megadsl.cli import checkpoint_export

app = typer.Typer(help="Inspect, compare, average, reshape, export and import checkpoints.", no_args_is_help=True)
app.command("export")(checkpoint_export.export)
app.command("import")(checkpoint_export.import_)


@app.command()
def inspect(
    checkpoint: Path = typer.Argument(..., help="A run folder or one of its checkpoints, damaged ones included."),
    as_json: bool = typer.Option(False, "--json", help="Print one JSON object."),
) -> None:
    """What is in a checkpoint and whether it is complete (every file is read); exit code 1 where it is not."""
    from megadsl.checkpoint.inspect import inspect as report_of

    report = report_of(checkpoint)
    if as_json:
        print(json.dumps(report))
    else:
        for line in _lines(report):
            print(line)
    if not report["complete"]:
        raise typer.Exit(1)


@app.command()
def diff(
    a: Path = typer.Argument(...), b: Path = typer.Argument(...),
    top: int = typer.Option(20, min=1, help="Show so many differences of each sort."),
    as_json: bool = typer.Option(False, "--json", help="Print one JSON object with all of them."),
) -> None:
    """Config keys, plan numbers and parameters in which two checkpoints differ, the largest relative difference first."""
    from megadsl.checkpoint.inspect import diff as differences_of
    from megadsl.checkpoint.store import open_checkpoint

    found = differences_of(open_checkpoint(a), open_checkpoint(b))
    if as_json:
        print(json.dumps({section: [asdict(one) for one in differences] for section, differences in found.items()}))
        return
    for section, differences in found.items():
        print(f"{section}: {len(differences)} differences")
        for one in differences[:top]:
            relative = "" if one.relative is None else f"  relative {one.relative:.3e}"
            print(f"  {one.key}: {one.a} -> {one.b}{relative}")


@app.command()
def average(
    checkpoints: list[Path] = typer.Argument(..., help="Checkpoints (or run folders) of one model."),
    output: Path = typer.Option(..., help="Folder of the new checkpoint; it must not exist."),
    last: int = typer.Option(None, min=1, help="Of the one run that is named, its last so many checkpoints (checkpoint.keep_last keeps them)."),
) -> None:
    """Average weights in fp32. Optimizer state is left out: a run that goes on from the result starts its optimizer anew."""
    from megadsl.checkpoint.reshape import average as write_average
    from megadsl.checkpoint.reshape import last_checkpoints

    if last is not None:
        checkpoints = last_checkpoints(checkpoints, last)
    print(f"wrote {write_average(checkpoints, output)} (the mean of {len(checkpoints)}, without optimizer state)")


@app.command()
def reshape(
    source: Path = typer.Argument(..., metavar="IN", help="A run folder or one of its checkpoints."),
    output: Path = typer.Argument(..., metavar="OUT", help="Folder of the new checkpoint; it must not exist."),
    tensor_parallel: int = typer.Option(1, min=1, help="parallel.tensor_model_parallel_size of the copy."),
    pipeline_parallel: int = typer.Option(1, min=1, help="parallel.pipeline_model_parallel_size of the copy."),
    zero_stage: int = typer.Option(None, min=0, max=3, help="parallel.zero_stage of the copy; default: as it was, 1 with a pipeline."),
) -> None:
    """Copy a checkpoint for another layout: verified, recorded, cut by its stages. Resuming under another layout does without:
    any checkpoint resumes under any layout by itself."""
    from megadsl.checkpoint.reshape import reshape as write_reshaped
    from megadsl.tasks.trained import entries_of_checkpoint

    print(f"wrote {write_reshaped(source, output, entries_of_checkpoint, tensor_parallel, pipeline_parallel, zero_stage)}")


def _lines(report: dict) -> list[str]:
    lines = [f"{report['path']}: {'complete' if report['complete'] else 'NOT COMPLETE'}", *(f"  {p}" for p in report["problems"])]
    if "iteration" not in report:
        return lines
    loss = "none" if report["loss"] is None else f"{report['loss']:.4f}"
    steps = "no optimizer state" if report["optimizer_steps"] is None else f"{report['optimizer_steps']:,} optimizer steps"
    lines += [
        f"iteration {report['iteration']:,}, {report['consumed_samples']:,} samples, loss {loss}, {steps}",
        f"saved with tensor {report['tensor']} x pipeline {report['pipeline']} x data {report['data']}, ZeRO {report['zero_stage']}",
        f"{report['files']} files, {report['bytes'] / 2**20:,.1f} MiB ({report['format']})",
    ]
    if "parameters" in report:
        lines.append(f"{report['family']}, {report['layers']} layers x {report['hidden_size']}, {report['parameters']:,} parameters, "
                     f"scheme {report['scheme']}")
    lines.append("versions: " + ", ".join(f"{name} {version}" for name, version in report["versions"].items()))
    return lines
