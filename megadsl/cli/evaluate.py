"""`megadsl evaluate CHECKPOINT --data ...`: how well a model does what it was trained for."""

import json
from pathlib import Path
from typing import Literal

import typer

from megadsl.cli.arguments import writing
from megadsl.errors import UserError


def evaluate(
    checkpoint: str = typer.Argument(..., help="A run folder or one of its checkpoints."),
    data: str = typer.Option(None, help="A dataset folder, or text: python-stdlib, a file, a folder or a glob."),
    split: Literal["train", "validation", "test"] = typer.Option("test", help="Split of a dataset folder."),
    batch_tokens: int = typer.Option(4096, min=1, help="Positions of a forward pass, padding included."),
    max_tokens: int = typer.Option(None, min=1, help="Read about so many tokens, spread over the whole split. Default: all."),
    pseudo_tokens: int = typer.Option(
        None, min=0, help="Tokens of a masked language model's pseudo-perplexity, one forward pass each; 0: none. Default: 512."),
    max_samples: int = typer.Option(None, min=1, help="Images, spread over the whole split. Default: all."),
    corruptions: bool = typer.Option(False, "--corruptions", help="Images: also corrupt them in 15 ways at 5 severities, as ImageNet-C."),
    corrupted: Path = typer.Option(None, help="Images: also read a folder of corrupted ones, CORRUPTION/SEVERITY/CLASS/PICTURE."),
    figures: Path = typer.Option(None, help="Images: write figures of confusion, calibration and corruptions into this folder."),
    num_beams: int = typer.Option(None, min=1, help="Beams of the search for what a model writes. Default: 5."),
    length_penalty: float = typer.Option(None, min=0, help="Exponent of the length that a hypothesis's score is divided by. Default: 1."),
    hypotheses: Path = typer.Option(None, help="Also write what the model wrote here, as JSON Lines with the references."),
    max_examples: int = typer.Option(None, min=1, help="Read so many examples, spread over the split. Default: all."),
    tensor_parallel: int = typer.Option(1, min=1, help="Ranks that share the model, where it is larger than one device."),
    device: Literal["auto", "cpu", "cuda"] = typer.Option("auto"),
    output: Path = typer.Option(None, help="Also write the numbers here, as JSON; megadsl report shows RUN/evaluation.json."),
    as_json: bool = typer.Option(False, "--json", help="Print one JSON object."),
) -> None:
    """The field's numbers of a trained model, on one process or under any launcher: the ranks share the batches.

    Example: megadsl evaluate runs/decoder-192 --data runs/demo/dataset --max-tokens 50000
    """
    from megadsl.checkpoint.store import open_checkpoint
    from megadsl.parallel.launch import discover_launch

    opened, launch = open_checkpoint(checkpoint), discover_launch()
    if launch.world_size % tensor_parallel:
        raise UserError(f"{launch.world_size} processes cannot be divided by --tensor-parallel {tensor_parallel}; start a multiple of it.")
    from megadsl.parallel.groups import destroy_groups
    from megadsl.tasks.task import EvaluationRequest
    from megadsl.tasks.trained import load_trained

    task, model = load_trained(opened, device, tensor_parallel=tensor_parallel, launch=launch)
    request = EvaluationRequest(
        data, split, batch_tokens, max_tokens, pseudo_tokens, max_samples, corruptions or None, corrupted, figures,
        num_beams, length_penalty, hypotheses, max_examples)
    try:
        results = task.evaluate(model, request)
    finally:
        destroy_groups()
    if not model.is_main:
        return
    if output is not None:
        with writing(output):
            output.write_text(json.dumps(results) + "\n", encoding="utf-8")
    print(json.dumps(results) if as_json else task.describe_results(results))
