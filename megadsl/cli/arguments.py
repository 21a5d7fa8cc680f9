"""What several verbs take: CONFIG files followed by overrides, and files that they write."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megadsl.config import Config, load_config
from megadsl.errors import UserError


def config_from_arguments(arguments: list[str]) -> Config:
    """Split `a.yaml b.yaml model.num_layers=24 scheme=vanilla` into files and overrides and load them."""
    files = [argument for argument in arguments if not re.match(r"[\w.]+=", argument)]
    overrides = [argument for argument in arguments if argument not in files]
    if not files:
        raise UserError("Name a configuration file first; `megadsl config show decoder-192 > mine.yaml` makes one.")
    from megadsl.tasks.registry import resolved

    return resolved(load_config(files, overrides))


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """Make the folder of an output file; what cannot be written is a sentence."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield path
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror or error}); choose another path.") from error
