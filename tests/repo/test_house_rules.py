"""The house rules of the design that a program can check: import direction, sizes, forbidden names, options that are read."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import BaseModel

from megadsl.config import Config
from megadsl.tasks.registry import TASKS, task_class

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "megadsl"
FILES = sorted(PACKAGE.rglob("*.py"))

# A package imports only from its own level's left.
LEVELS = [
    {"theory", "config"}, {"schemes", "parallel"}, {"data"}, {"model"}, {"checkpoint"}, {"inference"}, {"tasks"}, {"monitor"}, {"training"},
    {"cli"},
]
LEVEL = {name: index for index, names in enumerate(LEVELS) for name in names}
ONLY_IN = {
    "deepspeed": ("training/engine.py", "parallel/", "model/stack.py"),
    "megatron": ("parallel/", "model/", "data/", "checkpoint/megatron.py"),
    "mpi4py": ("parallel/launch.py", "data/preprocess.py"),
}


def imports(path: Path) -> set[str]:
    """Full names of the modules that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_left(path):
    relative = path.relative_to(PACKAGE)
    room = relative.parts[0]
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == "megadsl" and len(parts) > 1 and room in LEVEL and parts[1] in LEVEL and parts[1] != room:
            assert LEVEL[parts[1]] < LEVEL[room], f"{relative} imports {name}, which is not on its left"
        for library, places in ONLY_IN.items():
            if parts[0] == library:
                assert any(relative.as_posix().startswith(place) for place in places), f"{relative} imports {library}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_sizes_and_silence(path):
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    assert text.count("\n") <= 420, "a file has at most about 400 lines"
    assert path.stem not in ("utils", "helpers", "common")
    assert not text.strip() or ast.get_docstring(tree), "every file opens with what it is"
    assert ".cuda(" not in text, "the device is chosen in parallel/device.py"
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno - node.lineno <= 70, f"{node.name} is too long"
        if isinstance(node, ast.ExceptHandler):
            assert not (len(node.body) == 1 and isinstance(node.body[0], ast.Pass)), f"line {node.lineno} swallows an exception"


@pytest.mark.parametrize("room", ["theory", "schemes", "config", "training.preflight"])
def test_imports_without_torch(room):
    code = f"import sys; import megadsl.{room}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0, f"megadsl.{room} imports torch"


def config_fields(section: type[BaseModel], prefix: str = "") -> list[tuple[str, str]]:
    found = []
    for name, field in section.model_fields.items():
        inner = [a for a in (field.annotation, *getattr(field.annotation, "__args__", ())) if isinstance(a, type)]
        inner = [a for a in inner if issubclass(a, BaseModel)]
        found += config_fields(inner[0], f"{prefix}{name}.") if inner else [(f"{prefix}{name}", name)]
    return found


# Options that several tasks share are one field.
OPTIONS = config_fields(Config) + sorted({field for task in TASKS for field in config_fields(task_class(task).Options, "task.")})


@pytest.mark.parametrize("key, name", OPTIONS)
def test_every_option_is_read(key, name):
    """An attribute of the field's name is read somewhere (the section's own properties count)."""
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and node.attr == name and isinstance(node.ctx, ast.Load):
                return
    pytest.fail(f"no code reads {key}")
