"""`megadsl data`: raw text -> corpus -> dataset, the token statistics of a dataset, and the samples that a run makes of it."""

import json
from pathlib import Path
from typing import Literal

import typer

from megadsl.cli import data_text
from megadsl.cli.arguments import config_from_arguments
from megadsl.cli.data_images import images
from megadsl.parallel.launch import launched_rank

app = typer.Typer(help="Make a corpus and a training dataset, and look at its statistics and samples.", no_args_is_help=True)
app.add_typer(data_text.app, name="text")
app.command()(images)


@app.command()
def corpus(
    sources: list[str] = typer.Argument(
        None, help="python-stdlib (default), files, folders, globs: .txt .md .py .jsonl, .gz .zst of those",
    ),
    output: Path = typer.Option(..., help="corpus folder to write"),
    text_key: str = typer.Option("text", help="key of the text in .jsonl files"),
    validation_fraction: float = typer.Option(0.02, help="share of the documents in the validation split"),
    test_fraction: float = typer.Option(0.02, help="share of the documents in the test split"),
    max_document_chars: int = typer.Option(1_000_000, help="a longer text file is cut at line ends into documents of this size"),
) -> None:
    """Collect documents, drop duplicates, split them by the hash of their content."""
    from megadsl.data.corpus import build_corpus
    from megadsl.data.sources import STANDARD_LIBRARY

    fractions = (1 - validation_fraction - test_fraction, validation_fraction, test_fraction)
    manifest, reused = build_corpus(
        sources or [STANDARD_LIBRARY], output, text_key=text_key, fractions=fractions, max_document_chars=max_document_chars,
    )
    typer.echo(f"{output}/corpus.json: {_made(reused)}, {manifest['files']} files")
    for split, counts in manifest["splits"].items():
        typer.echo(f"  {split:<10} {counts['documents']:>9} documents {counts['text_bytes'] / 1e6:>10.2f} MB")
        if not counts["documents"]:
            typer.echo(f"  the {split} split is empty: add text, or cut it into more documents with --max-document-chars")
    counted = {name.replace("_", " "): count for name, count in manifest["report"].items() if isinstance(count, int) and count}
    if counted:
        typer.echo("  report: " + ", ".join(f"{count} {name}" for name, count in counted.items()))


@app.command()
def preprocess(
    corpus: Path = typer.Option(..., help="corpus folder (or any source of megadsl data corpus)"),
    tokenizer: Path = typer.Option(..., help="SentencePiece .model file"),
    output: Path = typer.Option(..., help="dataset folder to write"),
    workers: int = typer.Option(None, min=1, help="processes (default: all cores, or mpirun's ranks); the result is the same"),
    seq_length: int = typer.Option(128, min=2, help="sequence length that stats.json is measured at"),
) -> None:
    """Encode a corpus into Megatron's mmap format; under mpirun (or srun --mpi=pmi2) on all ranks, across nodes."""
    from megadsl.data.preprocess import preprocess as make_dataset

    manifest, reused = make_dataset(corpus, tokenizer, output, workers=workers, seq_length=seq_length)
    if launched_rank():
        return
    typer.echo(f"{output}/dataset.json: {_made(reused)}, tokenizer {manifest['tokenizer_sha256'][:12]}, {manifest['dtype']}")
    for split, counts in manifest["splits"].items():
        typer.echo(f"  {split:<10} {counts['documents']:>9} documents {counts['tokens']:>12} tokens")


@app.command()
def stats(
    dataset: Path = typer.Argument(..., help="dataset folder"),
    seq_length: int = typer.Option(128, min=2, help="sequence length at which repeated tokens are counted"),
) -> None:
    """Count tokens; writes DATASET/stats.json."""
    from megadsl.data.statistics import write_statistics

    typer.echo(json.dumps(write_statistics(dataset, seq_length), indent=2))


@app.command()
def show(
    arguments: list[str] = typer.Argument(..., metavar="CONFIG... [key=value...]", help="YAML files, then overrides"),
    samples: int = typer.Option(2, min=1, help="how many"),
    split: Literal["train", "validation", "test"] = typer.Option("train"),
) -> None:
    """Print the first samples of a run as pieces: what the model reads and what it must predict."""
    config = config_from_arguments(arguments)
    from rich.console import Console

    from megadsl.tasks.registry import task_of

    task = task_of(config)
    task.check()
    console = Console(width=None if Console().is_terminal else 120, highlight=False)
    for shown in task.describe_samples(split, samples):
        console.print(shown, markup=False)


@app.command()
def fetch(
    name: Literal["fashion-mnist", "fillets-ng"] = typer.Argument(
        ..., help="fashion-mnist: images (MIT); fillets-ng: Czech speech, English texts (GPL-2)"),
    output: Path = typer.Option(..., help="folder to write; what is there already is used again"),
) -> None:
    """Fetch a free data set that Debian packages (apt-get download; nothing is installed)."""
    from megadsl.tasks.image.fetch import fetch_fashion_mnist
    from megadsl.tasks.speech.fillets import fetch_fillets

    if name == "fashion-mnist":
        typer.echo(f"{output}: {name} {'is there already' if fetch_fashion_mnist(output) else 'fetched'}")
    else:
        manifest, count = fetch_fillets(output)
        typer.echo(f"{manifest}: {count} utterances of {name}")


@app.command()
def speech(
    manifest: Path = typer.Argument(..., help="TSV with the columns id, audio, n_frames, tgt_text (fairseq's); also split, src_text"),
    output: Path = typer.Option(..., help="dataset folder to write"),
    target_column: Literal["tgt_text", "src_text"] = typer.Option("tgt_text", help="what is written: a translation, or the transcript"),
    tokenizer: Path = typer.Option(None, help="SentencePiece .model of the targets (default: one is trained on the train split)"),
    vocab_size: int = typer.Option(1000, min=1, help="pieces of the tokenizer that is trained, of which 256 are bytes"),
    type: Literal["unigram", "bpe"] = typer.Option("unigram", help="how its pieces are found"),
    min_frames: int = typer.Option(5, min=1, help="shorter utterances are bad rows (a frame is 10 ms)"),
    max_frames: int = typer.Option(3000, min=1, help="longer utterances are bad rows"),
    validation_fraction: float = typer.Option(0.05, help="share of the validation split, by the hash of the target text; a column split overrides it"),
    test_fraction: float = typer.Option(0.05, help="share of the test split, likewise"),
    limit: int = typer.Option(None, min=1, help="read so many rows only"),
    workers: int = typer.Option(None, min=1, help="processes (default: all cores); the result is the same"),
    skip_bad_rows: bool = typer.Option(False, help="leave rows out that cannot be used, and count them"),
) -> None:
    """Utterances -> a dataset: log-mel filter banks, computed once and memory-mapped, and target texts with a tokenizer of their own."""
    from megadsl.tasks.speech.prepare import SpeechSettings, prepare_speech
    from megadsl.tasks.target_text.rows import checked_fractions

    settings = SpeechSettings(target_column, vocab_size, type, min_frames, max_frames, checked_fractions(validation_fraction, test_fraction), limit)
    made, reused = prepare_speech(manifest, output, settings, tokenizer, workers, skip_bad_rows)
    typer.echo(f"{output}/speech.json: {_made(reused)}, {made['num_bins']} filter banks, {made['vocab_size']} target pieces")
    for split, counts in made["splits"].items():
        typer.echo(f"  {split:<10} {counts['examples']:>9} utterances {counts['frames'] / 6000:>10.1f} minutes")
    _say_skipped(made)


@app.command()
def parallel(
    table: Path = typer.Argument(..., help="TSV with the columns src_text, tgt_text; also id, document, split"),
    output: Path = typer.Option(..., help="dataset folder to write"),
    tokenizer: Path = typer.Option(None, help="SentencePiece .model of both sides (default: one is trained on the train split)"),
    vocab_size: int = typer.Option(4000, min=1, help="pieces of the tokenizer that is trained, of which 256 are bytes"),
    type: Literal["unigram", "bpe"] = typer.Option("unigram", help="how its pieces are found"),
    max_tokens: int = typer.Option(128, min=2, help="rows with more on a side, its end included, are bad rows"),
    validation_fraction: float = typer.Option(0.02, help="share of the validation split, by the hash of the document; a column split overrides it"),
    test_fraction: float = typer.Option(0.02, help="share of the test split, likewise"),
    limit: int = typer.Option(None, min=1, help="read so many rows only"),
    skip_bad_rows: bool = typer.Option(False, help="leave rows out that cannot be used, and count them"),
) -> None:
    """Parallel texts -> a dataset for task.name=translation."""
    from megadsl.tasks.target_text.rows import checked_fractions
    from megadsl.tasks.translation.prepare import ParallelSettings, prepare_parallel

    settings = ParallelSettings(vocab_size, type, max_tokens, checked_fractions(validation_fraction, test_fraction), limit)
    made, reused = prepare_parallel(table, output, settings, tokenizer, skip_bad_rows)
    typer.echo(f"{output}/parallel.json: {_made(reused)}, {made['vocab_size']} pieces")
    for split, counts in made["splits"].items():
        typer.echo(f"  {split:<10} {counts['examples']:>9} pairs")
    _say_skipped(made)


def _say_skipped(made: dict) -> None:
    for reason, count in made["skipped_rows"].items():
        typer.echo(f"  left out: {count} rows, because each {reason}")


def _made(reused: bool) -> str:
    return "up to date, used again" if reused else "written"
