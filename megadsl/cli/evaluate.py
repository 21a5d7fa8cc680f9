"""`megadsl evaluate CHECKPOINT --data ...`: how well a model does what it was trained for."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Literal

import typer


def evaluate(
    checkpoint: str = typer.Argument(..., help="A run folder or one of its checkpoints."),
    data: str = typer.Option(..., help="A dataset folder, or text: python-stdlib, a file, a folder or a glob."),
    split: str = typer.Option("test", help="Split of a dataset folder."),
    batch_size: int = typer.Option(8, min=1),
    max_tokens: int = typer.Option(0, min=0, help="Read only so many tokens; 0: all."),
    pseudo_tokens: int = typer.Option(512, min=0, help="Tokens of an encoder's pseudo-perplexity, one forward pass each; 0: none."),
    device: Literal["auto", "cpu", "cuda"] = typer.Option("auto"),
    as_json: bool = typer.Option(False, "--json", help="Print one JSON object."),
) -> None:
    """Decoder: perplexity and bits per byte. Encoder: masked accuracy, pseudo-perplexity. Encoder-decoder: denoising loss, spans."""
    from megadsl.checkpoint.store import open_checkpoint

    opened = open_checkpoint(checkpoint)
    from megadsl.data.dataset import MANIFEST
    from megadsl.data.stream import tokens_of_split, tokens_of_text
    from megadsl.data.tokenizer import Tokenizer
    from megadsl.inference.denoising import evaluate_denoising
    from megadsl.inference.load import load_model
    from megadsl.inference.masked import evaluate_masked
    from megadsl.inference.perplexity import evaluate_perplexity

    tokenizer = Tokenizer.load(opened.tokenizer)
    if (Path(data) / MANIFEST).is_file():
        tokens, size = tokens_of_split(Path(data), split, tokenizer.sha256)
    else:
        tokens, size = tokens_of_text(data, tokenizer)
    model = load_model(opened, device)
    if model.config.model.family == "decoder":
        result = evaluate_perplexity(model, tokens, size, batch_size, max_tokens)
    elif model.config.model.family == "encoder":
        result = evaluate_masked(model, tokens, batch_size, max_tokens, pseudo_tokens)
    else:
        result = evaluate_denoising(model, tokens, batch_size, max_tokens)
    print(json.dumps(asdict(result)) if as_json else result.text())
