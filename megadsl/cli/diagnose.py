"""`megadsl diagnose MODEL --data ...`: what a model that exists does with its signal, as a page and as JSON."""

from pathlib import Path
from typing import Literal

import typer

from megadsl.cli.arguments import writing
from megadsl.errors import UserError


def diagnose(
    model: Path = typer.Argument(..., help="A run folder, one of its checkpoints, or the folder of a Hugging Face model (safetensors)."),
    data: str = typer.Option(
        None, help="A dataset folder, or text: python-stdlib, a file, a folder or a glob. Default: what the model was trained on."),
    split: Literal["train", "validation", "test"] = typer.Option("validation", help="Split of a dataset folder."),
    samples: int = typer.Option(16, min=1, help="Sequences to measure on."),
    skips: int = typer.Option(24, min=0, help="Leave out so many single layers, one at a time, and a third as many windows; 0: none."),
    batch_tokens: int = typer.Option(4096, min=1, help="Positions of a forward pass."),
    tokenizer: Path = typer.Option(None, help="SentencePiece model, where a Hugging Face folder has none."),
    device: Literal["auto", "cpu", "cuda"] = typer.Option("auto"),
    output: Path = typer.Option(Path("diagnosis.html"), help="HTML file to write; the numbers go beside it, as .json."),
    as_json: bool = typer.Option(False, "--json", help="Print the numbers as one JSON object."),
) -> None:
    """Moments by depth, rank collapse, effective depth, attention by head, outlier features, the plan that fits best.

    Example: megadsl diagnose runs/decoder-192 --data runs/demo/dataset --output diagnosis.html
    """
    if output.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"--output {output}: the name must end in .html.")
    from megadsl.monitor.diagnosis.measure import diagnose as measure
    from megadsl.monitor.diagnosis.measure import opened_model
    from megadsl.monitor.pages.diagnosis_page import diagnosis_page, findings
    from megadsl.tasks.task import EvaluationRequest

    with opened_model(model, device, tokenizer) as subject:
        found = measure(subject, EvaluationRequest(data, split, batch_tokens), samples, skips)
        page = diagnosis_page(found, model.resolve().name, None if subject.imported else subject.plan)
    with writing(output):
        page.write(output)
        output.with_suffix(".json").write_text(found.to_json(indent=1) + "\n", encoding="utf-8")
    if as_json:
        typer.echo(found.to_json())
        return
    for line in findings(found):
        typer.echo(line)
    typer.echo(f"Diagnosis: {output}, {output.with_suffix('.json')}")
