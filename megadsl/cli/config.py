"""`megadsl config`: the example configs that come along, to start a config of your own from."""

import typer

from megadsl.config.resources import example_config, example_configs

app = typer.Typer(help="Example configs to start your own from.", no_args_is_help=True)


@app.command("list")
def list_examples() -> None:
    """Names of the example configs, each with what it is."""
    examples = example_configs()
    width = max(map(len, examples))
    for name, path in examples.items():
        first = path.read_text(encoding="utf-8").partition("\n")[0]
        typer.echo(f"{name:<{width}}  {first.lstrip('# ')}")


@app.command()
def show(name: str = typer.Argument(None, metavar="[NAME]", help="one of megadsl config list; without it they are listed")) -> None:
    """Print an example config: megadsl config show decoder-192 > mine.yaml"""
    if name is None:
        list_examples()
    else:
        typer.echo(example_config(name.removesuffix(".yaml")).read_text(encoding="utf-8"), nl=False)
