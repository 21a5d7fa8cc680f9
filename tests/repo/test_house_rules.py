"""The house rules of the design that a program can check: import direction, sizes, forbidden names, options that are read."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from option_reads import OptionReads
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


def sections_of(section: type[BaseModel]) -> dict[str, dict[str, str | None]]:
    """Every section class below `section`, itself included -> {field: the section class that it holds (also in a tuple), or None}."""
    found = {section.__name__: {}}
    for name, field in section.model_fields.items():
        inner = [a for a in (field.annotation, *getattr(field.annotation, "__args__", ())) if isinstance(a, type) and issubclass(a, BaseModel)]
        found[section.__name__][name] = inner[0].__name__ if inner else None
        for one in inner:
            found |= sections_of(one)
    return found


def unread_options(sections: dict[str, dict[str, str | None]], sources: list[str]) -> list[str]:
    """Section class.field of what no code reads."""
    read = OptionReads(sections, sources).read()
    return [f"{section}.{name}" for section, fields in sections.items() for name in fields if (section, name) not in read]


SECTIONS = sections_of(Config)
for task in TASKS:
    SECTIONS |= sections_of(task_class(task).Options)
SOURCES = [path.read_text(encoding="utf-8") for path in FILES]


def test_every_option_is_read():
    """Where one is read of something without a type, annotate that with its section."""
    assert unread_options(SECTIONS, SOURCES) == []


def test_no_option_is_taken_for_read_by_its_name():
    """Every section is given the names of all others' options too: not one of these is read."""
    names = {name for fields in SECTIONS.values() for name in fields}
    planted = {section: {**dict.fromkeys(names), **fields} for section, fields in SECTIONS.items()}
    expected = {f"{section}.{name}" for section, fields in SECTIONS.items() for name in names - fields.keys()}
    assert len(expected) > 500 and set(unread_options(planted, SOURCES)) == expected


def test_an_option_whose_name_is_read_elsewhere_is_found():
    """What a search by the bare name passes over: scheme.name beside path.name, monitor.width beside model.width, a validator."""
    sections = {
        "Config": {"model": "Model", "monitor": "Monitor"}, "Model": {"width": None, "depth": None, "parts": "Part"},
        "Monitor": {"width": None, "name": None, "depth": None}, "Part": {"path": None, "name": None},
    }
    source = """
class Model:
    @property
    def size(self): return self.depth * 2

class Monitor:
    def _checked(self): assert self.depth

class Run:
    def __init__(self, config: Config, path):
        self.options, self.monitor = config.model, path
        print(path.name, self.options.width, self.monitor.width)

    def show(self):
        return self.options.size, [part.path for part in self.options.parts]
"""
    assert unread_options(sections, [source]) == ["Config.monitor", "Monitor.width", "Monitor.name", "Monitor.depth", "Part.name"]
    more = source + """
def log(monitor: "Monitor | None", config: Config):
    for part in config.model.parts:
        part.name
    getattr(monitor, "name"), config.monitor.width, monitor.depth
"""
    assert unread_options(sections, [more]) == []
