"""Write docs/config.md from the config sections and the tasks' options: python tools/document_config.py (a test holds it current)."""

from pathlib import Path

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from megadsl.config import Config
from megadsl.tasks.registry import DEFAULTS, TASKS, task_class

PATH = Path(__file__).resolve().parents[1] / "docs" / "config.md"


def document() -> str:
    """The reference as Markdown."""
    lines = ["# Configuration", "", "Made by `python tools/document_config.py`. Unknown keys are refused; overrides are `section.key=value`."]
    for name, field in Config.model_fields.items():
        section: type[BaseModel] = field.annotation
        lines += ["", f"## {name}", "", " ".join(section.__doc__.split()), "", *_table(name, section)]
        if name == "task":
            for task in TASKS:
                lines += ["", f"### task.name={task}", "", _task_title(task), "", *_table(name, task_class(task).Options)]
    return "\n".join(lines) + "\n"


def _table(prefix: str, section: type[BaseModel]) -> list[str]:
    rows = _rows(prefix, section)
    return ["| key | type | default | |", "|---|---|---|---|", *rows] if rows else ["It has no options."]


def _rows(prefix: str, section: type[BaseModel]) -> list[str]:
    """A row an option; those of a section inside the section stand under its key."""
    rows = []
    for key, item in section.model_fields.items():
        if isinstance(item.annotation, type) and issubclass(item.annotation, BaseModel):
            rows += [f"| {prefix}.{key} | | | {' '.join(item.annotation.__doc__.split())} |", *_rows(f"{prefix}.{key}", item.annotation)]
            continue
        default = "" if item.default is PydanticUndefined else f"`{item.default!r}`"
        rows.append(f"| {prefix}.{key} | {_type(item.annotation)} | {default} | {item.description or ''} |")
    return rows


def _task_title(task: str) -> str:
    """For which model.family, and where task.name may be left out."""
    families = task_class(task).families
    default = [family for family, name in DEFAULTS.items() if name == task]
    return f"For model.family {' or '.join(families)}" + f"; the default of {' and '.join(default)}" * bool(default) + "."


def _type(annotation) -> str:
    values = getattr(annotation, "__args__", ())
    if values and all(isinstance(value, (str, int)) and not isinstance(value, type) for value in values):
        return ", ".join(f"`{value}`" for value in values)
    return str(getattr(annotation, "__name__", annotation)).replace("|", "or").replace("NoneType", "None")


if __name__ == "__main__":
    PATH.write_text(document(), encoding="utf-8")
    print(f"wrote {PATH}")
