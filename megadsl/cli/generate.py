"""`megadsl generate CHECKPOINT --prompt ...`: continue a text."""

from typing import Literal

import typer


def generate(
    checkpoint: str = typer.Argument(..., help="A run folder or one of its checkpoints."),
    prompt: str = typer.Option("", help="Text to continue; empty: start a document."),
    max_new_tokens: int = typer.Option(100),
    temperature: float = typer.Option(1.0, help="0 is greedy."),
    top_k: int = typer.Option(0, help="Choose among the k likeliest tokens; 0: all."),
    top_p: float = typer.Option(1.0, help="Choose among the likeliest tokens that hold this probability."),
    greedy: bool = typer.Option(False, "--greedy", help="Always the likeliest token (temperature 0)."),
    num_samples: int = typer.Option(1),
    seed: int = typer.Option(0),
    device: Literal["auto", "cpu", "cuda"] = typer.Option("auto"),
) -> None:
    """Continue a prompt; stops at the end of the document."""
    from megadsl.checkpoint.store import open_checkpoint

    opened = open_checkpoint(checkpoint)
    from megadsl.inference.generate import generate as generate_text
    from megadsl.inference.load import load_model
    from megadsl.inference.sampling import Sampling

    sampling = Sampling(0.0 if greedy else temperature, top_k, top_p, seed)
    texts = generate_text(load_model(opened, device), prompt, max_new_tokens, sampling, num_samples)
    for index, text in enumerate(texts):
        if num_samples > 1:
            print(f"--- sample {index + 1}")
        print(prompt + text)
