"""`megadsl data images`: pictures -> the memory-mapped form that image_classification reads."""

from pathlib import Path

import typer


def images(
    source: Path = typer.Argument(..., help="Folder of idx files, of .npz files or of class folders, or one .npz file."),
    output: Path = typer.Option(..., help="Folder to write."),
    size: int = typer.Option(None, min=1, help="Scale and cut pictures of class folders to this height and width."),
    channels: int = typer.Option(None, min=1, max=3, help="Make pictures of class folders grey (1) or coloured (3)."),
    num_classes: int = typer.Option(None, min=2, help="Classes of idx and .npz files. Default: their largest training label and one."),
    validation_fraction: float = typer.Option(0.1, help="Share of the training images, where the source has no validation part."),
    test_fraction: float = typer.Option(0.1, help="Share of the training images, where the source has no test part."),
    skip_bad_rows: bool = typer.Option(False, "--skip-bad-rows", help="Count rows that cannot be used instead of stopping at the first."),
) -> None:
    """Check pictures and labels, cut splits, measure mean and deviation.

    Example: megadsl data images runs/fashion-mnist/source --output runs/fashion-mnist/images
    """
    from megadsl.tasks.image.prepare import Preparation, prepare_images

    wanted = Preparation(size, channels, num_classes, validation_fraction, test_fraction, skip_bad_rows)
    manifest, reused = prepare_images(source, output, wanted)
    typer.echo(f"{output}/images.json: {'up to date, used again' if reused else 'written'}, {manifest['height']} x {manifest['width']}, "
               f"{manifest['channels']} channels, {len(manifest['classes'])} classes")
    for split, count in manifest["splits"].items():
        typer.echo(f"  {split:<10} {count:>9} images")
    mean, deviation = (", ".join(f"{value:.4f}" for value in manifest[key]) for key in ("mean", "deviation"))
    typer.echo(f"  mean {mean} deviation {deviation}")
    if manifest["skipped_rows"]:
        typer.echo(f"  {manifest['skipped_rows']} rows left out, the first: {manifest['first_skipped'][0]}")
