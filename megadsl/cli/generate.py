"""`megadsl generate CHECKPOINT --prompt ...`: continue a text, or fill the gaps of one."""

from pathlib import Path
from typing import Literal

import typer

from megadsl.cli.arguments import writing


def generate(
    checkpoint: str = typer.Argument(..., help="A run folder or one of its checkpoints."),
    prompt: str = typer.Option("", help="Text to continue (empty: start a document), or with <extra_id_0> ... or <mask> to fill in."),
    max_new_tokens: int = typer.Option(100),
    temperature: float = typer.Option(1.0, help="0 is greedy."),
    top_k: int = typer.Option(0, help="Choose among the k likeliest tokens; 0: all."),
    top_p: float = typer.Option(1.0, help="Choose among the likeliest tokens that hold this probability."),
    greedy: bool = typer.Option(False, "--greedy", help="Always the likeliest token (temperature 0)."),
    num_samples: int = typer.Option(1),
    num_beams: int = typer.Option(1, help="Beam search of an encoder-decoder with so many beams; 1: none."),
    seed: int = typer.Option(0),
    device: Literal["auto", "cpu", "cuda"] = typer.Option("auto"),
    output: Path = typer.Option(None, help="Also write the text here; megadsl report shows RUN/sample.txt."),
) -> None:
    """Decoder: continue a prompt. Encoder-decoder: write the target of a source text."""
    from megadsl.checkpoint.store import open_checkpoint

    opened = open_checkpoint(checkpoint)
    from megadsl.inference.sampling import Sampling
    from megadsl.tasks.trained import load_trained

    sampling = Sampling(0.0 if greedy else temperature, top_k, top_p, seed)
    task, model = load_trained(opened, device)
    texts = task.generate(model, prompt, max_new_tokens, sampling, num_samples, num_beams)
    titles = [f"--- sample {index + 1}\n" for index in range(len(texts))] if num_samples > 1 else [""] * len(texts)
    written = "\n".join(title + text for title, text in zip(titles, texts, strict=True))
    print(written)
    if output is not None:
        with writing(output):
            output.write_text(written + "\n", encoding="utf-8")
