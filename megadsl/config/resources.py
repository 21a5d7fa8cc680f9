"""The files that come along: example configs, DeepSpeed's JSON files and the SLURM scripts.

In the repository they are folders at its top; setup.py puts them under megadsl/share/ of a wheel. Only this file knows both.
"""

import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from megadsl.errors import UserError

_PACKAGE = Path(__file__).resolve().parents[1]


def shared_folder(name: Literal["configs", "ds_configs", "slurm"]) -> Path:
    """Where a folder of shared files lies: in an installed package, else in the checkout around it. It may be missing."""
    installed = _PACKAGE / "share"
    return (installed if installed.is_dir() else _PACKAGE.parent) / name


def example_configs() -> dict[str, Path]:
    """Name -> file of every example config.

    Raises:
        UserError: there is none.
    """
    folder = shared_folder("configs")
    found = {path.stem: path for path in sorted(folder.glob("*.yaml"))}
    if not found:
        raise UserError(f"There are no example configs in {folder}; {how_to_restore(folder)}.")
    return found


def example_config(name: str) -> Path:
    """The file of one example config; UserError with the nearest names where there is no such one."""
    examples = example_configs()
    if name not in examples:
        raise UserError(f"There is no example config {name}{near_misses(name, examples)}; `megadsl config list` shows all.")
    return examples[name]


def shared_deepspeed_config(name: str) -> Path:
    """ds_configs/NAME.json; UserError with the way out where it is missing."""
    folder = shared_folder("ds_configs")
    path = folder / f"{name}.json"
    if not path.is_file():
        near = near_misses(name, [path.stem for path in folder.glob("*.json")])
        raise UserError(
            f"parallel.deepspeed_config: there is no {path}{near}; {how_to_restore(folder)}, give a JSON file of your own, "
            "or set parallel.deepspeed_config=none for nothing but the derived keys."
        )
    return path


def how_to_restore(folder: Path) -> str:
    """The way out where a shared file is missing, as words of a sentence."""
    return f"restore {folder.name}/ (git checkout {folder.name})" if folder.parent == _PACKAGE.parent else "install megadsl again"


def near_misses(name: str, known: Iterable[str]) -> str:
    """In brackets: did you mean A or B? Nothing where no known name is near."""
    near = difflib.get_close_matches(name, list(known), n=3, cutoff=0.6)
    return f" (did you mean {' or '.join(near)}?)" if near else ""
