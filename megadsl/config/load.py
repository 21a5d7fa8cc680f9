"""Load a run's configuration: YAML files merged in order, then `key=value` overrides; every mistake is one sentence."""

import difflib
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError

from megadsl.config.run import Config
from megadsl.errors import UserError

SectionType = TypeVar("SectionType", bound=BaseModel)
# Options of language modelling that stood in section data once: old key there -> key of section task.
_MOVED = {
    name: name for name in ("reset_position_ids", "reset_attention_mask", "eod_mask_loss", "prefix_lm", "masking_probability",
                            "masking_do_full_word", "sentence_order", "noise_density", "mean_noise_span_length")
} | {"denoising": "corruption"}
_FORMER_OPTIONS = {
    "decoder": {"reset_position_ids", "reset_attention_mask", "eod_mask_loss", "prefix_lm"},
    "encoder": {"reset_position_ids", "reset_attention_mask", "masking_probability", "masking_do_full_word", "sentence_order"},
    "encoder_decoder": {"corruption", "noise_density", "mean_noise_span_length"},
}


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


def load_saved_config(path: Path) -> Config:
    """The configuration that `save_config` wrote, also by an earlier version."""
    return parse_config(upgraded(OmegaConf.to_container(_read_yaml(path))))


def parse_config(values: dict) -> Config:
    """Validate a plain nested dict (as `load_config` does after merging)."""
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise UserError(_sentence(error.errors()[0])) from error


def validate_section(section: type[SectionType], values: dict, prefix: str) -> SectionType:
    """`values` as a section that stands under `prefix`; UserError at the first unknown key or wrong value."""
    try:
        return section.model_validate(values)
    except ValidationError as error:
        raise UserError(_sentence(error.errors()[0], section, (prefix,))) from error


def upgraded(values: dict) -> dict:
    """The values of a configuration that an earlier version wrote, under today's keys (data.prefix_lm is task.prefix_lm now)."""
    data = values.get("data") or {}
    moved = {new: data[old] for old, new in _MOVED.items() if old in data}
    if not moved:
        return values
    keys = _FORMER_OPTIONS[(values.get("model") or {}).get("family", "decoder")]
    task = {new: value for new, value in moved.items() if new in keys}
    return {**values, "data": {key: value for key, value in data.items() if key not in _MOVED}, "task": task}


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


def _sentence(error: dict, section: type[BaseModel] = Config, prefix: tuple[str, ...] = ()) -> str:
    """One error of pydantic as a sentence; its location is within `section`, which stands under `prefix`."""
    key = ".".join(map(str, (*prefix, *error["loc"])))
    if error["type"] == "extra_forbidden":
        if prefix + error["loc"][:-1] == ("data",) and error["loc"][-1] in _MOVED:
            return f"Unknown key {key}; it is task.{_MOVED[error['loc'][-1]]} now."
        known = _known_keys(error["loc"][:-1], section)
        near = difflib.get_close_matches(str(error["loc"][-1]), known, n=1, cutoff=0.0)
        hint = f"; did you mean {'.'.join([*prefix, *map(str, error['loc'][:-1]), near[0]])}?" if near else "; this section has no keys."
        return f"Unknown key {key}{hint}"
    if error["type"] == "value_error":
        return f"{key + ': ' if key else ''}{error['ctx']['error']}."
    message = error["msg"][0].lower() + error["msg"][1:]
    return f"{key}: {message}, not {error['input']!r}."


def _known_keys(parents: tuple, section: type[BaseModel]) -> list[str]:
    for name in parents:
        if isinstance(name, int):
            continue
        annotation = section.model_fields[name].annotation
        candidates = [annotation, *getattr(annotation, "__args__", ())]
        section = next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), section)
    return list(section.model_fields)
