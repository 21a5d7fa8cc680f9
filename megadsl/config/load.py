"""Load a run's configuration: YAML files merged in order, then `key=value` overrides; every mistake is one sentence."""

import difflib
import os
import re
from collections.abc import Sequence
from pathlib import Path

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError

from megadsl.config.run import Config
from megadsl.errors import UserError


def load_config(files: Sequence[str | os.PathLike] | str | os.PathLike, overrides: Sequence[str] = ()) -> Config:
    """Read YAML `files` (later ones win), apply `overrides` such as "model.num_layers=24", validate.

    Raises:
        UserError: a missing file, broken YAML, an unknown key (with the nearest known one) or a wrong value.
    """
    if isinstance(files, (str, os.PathLike)):
        files = [files]
    layers = [_read_yaml(Path(file)) for file in files]
    layers.append(_read_overrides(overrides))
    try:
        merged = OmegaConf.to_container(OmegaConf.merge(*map(_long_scheme, layers)), resolve=True)
    except OmegaConfBaseException as error:
        raise UserError(f"The configuration does not merge: {str(error).splitlines()[0]}") from error
    return parse_config(merged)


def parse_config(values: dict) -> Config:
    """Validate a plain nested dict (as `load_config` does after merging)."""
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise UserError(_sentence(error.errors()[0])) from error


def save_config(config: Config, path: Path) -> None:
    """Write the resolved configuration as YAML that `load_config` reads back to an equal one."""
    path.write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False), encoding="utf-8")


def _read_yaml(path: Path):
    try:
        layer = OmegaConf.load(path)
    except FileNotFoundError as error:
        raise UserError(f"There is no configuration file {path}; `megadsl config list` names examples to start from.") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"{path} is not readable YAML: {' '.join(str(error).split())}") from error
    if not OmegaConf.is_dict(layer):
        raise UserError(f"{path} must hold sections such as `model:`, not a list or a single value.")
    return layer


def _read_overrides(overrides: Sequence[str]):
    for override in overrides:
        if "=" not in override:
            raise UserError(f"'{override}' is neither a .yaml file nor an override of the form section.key=value.")
    # The short form must not replace options that another override gives.
    overrides = [re.sub(r"^scheme=(?!\s*\{)", "scheme.name=", override) for override in overrides]
    try:
        return OmegaConf.from_dotlist(overrides)
    except (OmegaConfBaseException, yaml.YAMLError) as error:
        raise UserError(f"An override cannot be read: {' '.join(str(error).split())}") from error


def _long_scheme(layer):
    # `scheme: vanilla` and `scheme.k=1` must merge whichever form each layer uses.
    if isinstance(layer.get("scheme"), str):
        layer.scheme = {"name": layer.scheme}
    return layer


def _sentence(error: dict) -> str:
    key = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        known = _known_keys(error["loc"][:-1])
        near = difflib.get_close_matches(str(error["loc"][-1]), known, n=1, cutoff=0.0)
        hint = f"; did you mean {'.'.join([*map(str, error['loc'][:-1]), near[0]])}?" if near else ""
        return f"Unknown key {key}{hint}"
    if error["type"] == "value_error":
        return f"{key + ': ' if key else ''}{error['ctx']['error']}."
    message = error["msg"][0].lower() + error["msg"][1:]
    return f"{key}: {message}, not {error['input']!r}."


def _known_keys(parents: tuple) -> list[str]:
    section: type[BaseModel] = Config
    for name in parents:
        if isinstance(name, int):
            continue
        annotation = section.model_fields[name].annotation
        candidates = [annotation, *getattr(annotation, "__args__", ())]
        section = next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), section)
    return list(section.model_fields)
