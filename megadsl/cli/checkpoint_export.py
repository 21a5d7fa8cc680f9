"""`megadsl checkpoint export` and `import`: to and from Hugging Face and Megatron-core, verified by comparing logits."""

import time
from pathlib import Path
from typing import Literal

import typer


def export(
    checkpoint: Path = typer.Argument(..., help="A run folder or one of its checkpoints."),
    output: Path = typer.Argument(..., metavar="OUT", help="Folder to write; it must not exist."),
    format: Literal["hf", "megatron"] = typer.Option("hf", help="hf: transformers; megatron: Megatron-core's torch_dist, a GPTModel"),
    architecture: str = typer.Option("auto", help="Class of transformers; auto: the one for the model."),
    dtype: Literal["fp32", "bf16"] = typer.Option("fp32", help="How the weights are stored."),
) -> None:
    """Write a plain model, the scheme folded into its weights; reloads it and compares logits before the folder appears."""
    from megadsl.checkpoint.huggingface.export import choose_architecture, export_huggingface
    from megadsl.checkpoint.store import open_checkpoint
    from megadsl.tasks.export import export_of_task, export_source
    from megadsl.tasks.registry import task_of

    opened, begun = open_checkpoint(checkpoint), time.perf_counter()
    model = opened.config().model
    if format == "megatron":
        from megadsl.checkpoint.megatron import export_megatron

        error = export_megatron(export_source(opened), output)
        typer.echo(f"{output}: GPTModel, largest relative difference of logits {error:.1e}; {time.perf_counter() - begun:.1f} s")
        return
    if task_of(opened.config()).exports_itself:
        name, error = export_of_task(opened, output)
        typer.echo(f"{output}: {name}, largest relative difference of logits {error:.1e}; {time.perf_counter() - begun:.1f} s")
        return
    choose_architecture(model, architecture).require(model)  # before the weights are read
    result = export_huggingface(export_source(opened), output, architecture, dtype)
    for note in result.notes:
        typer.echo(f"note: {note}")
    found = result.comparison
    rounded = "" if found.rounded_error is None else f", {found.rounded_error:.1e} as stored in {dtype}"
    typer.echo(f"{output}: {result.architecture}, largest relative difference of logits {found.error:.1e} over {found.positions} "
               f"positions{rounded}; {time.perf_counter() - begun:.1f} s")


def import_(
    folder: Path = typer.Argument(..., help="Folder of a Hugging Face model (safetensors)."),
    output: Path = typer.Argument(..., metavar="OUT", help="Checkpoint to write; it must not exist."),
    scheme: str = typer.Option("vanilla", help="vanilla: as it is; another: its scalars are divided out of the weights."),
    tokenizer: Path = typer.Option(None, help="SentencePiece model, where the folder has none."),
    format: Literal["hf", "megatron"] = typer.Option("hf", help="hf: transformers; megatron: Megatron-core's torch_dist, a GPTModel"),
    config: Path = typer.Option(None, help="megatron: YAML with the model section, scheme and tokenizer, which its folder has not."),
    trust: bool = typer.Option(False, "--trust", help="megatron: read the pickles of its index, which can run code."),
) -> None:
    """Make a checkpoint to start from (checkpoint.init_from), and compare its logits with those of transformers."""
    from megadsl.config import load_config
    from megadsl.errors import UserError
    from megadsl.tasks.export import import_from_huggingface, import_from_megatron

    if format == "megatron":
        if config is None:
            raise UserError("--format megatron needs --config FILE: a YAML with the model section, scheme and tokenizer of the model.")
        loaded = load_config(config)
        import_from_megatron(folder, output, loaded, trust)
        typer.echo(f"{output}: scheme {loaded.scheme.name}; start from it with checkpoint.init_from={output}")
        return
    error = import_from_huggingface(folder, output, scheme, tokenizer)
    typer.echo(f"{output}: scheme {scheme}, largest relative difference of logits {error:.1e}; start from it with "
               f"checkpoint.init_from={output} and the model section of {output}/config.yaml")
