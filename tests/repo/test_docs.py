"""Docs are executed or parsed: every command in the README has the flags and config keys it shows, every link leads somewhere."""

import re
import shlex
from pathlib import Path

import pytest
import typer

from megadsl.cli.arguments import config_from_arguments
from megadsl.cli.main import app

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "slurm" / "README.md"]


def commands(page: Path) -> list[str]:
    """Lines of code blocks, and code spans, that call megadsl (under whatever launcher)."""
    text = page.read_text(encoding="utf-8")
    blocks = re.findall(r"```(?:bash|text)\n(.*?)```", text, flags=re.S)
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.S))
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()] + spans
    calls = [line for line in lines if re.search(r"(^|/|-m |--module )megadsl [a-z]", line) and "..." not in line]
    return [line for line in calls if len(line.split()) > 3]  # shorter ones name a verb, they do not call it


FOUND = [(page.relative_to(ROOT), line) for page in PAGES for line in commands(page)]


def test_there_are_commands():
    assert len([line for page, line in FOUND if page == Path("README.md")]) > 10


@pytest.mark.parametrize("page, line", FOUND, ids=lambda value: str(value)[:60])
def test_command_parses(page, line, monkeypatch):
    words = shlex.split(line.partition(" > ")[0], comments=True)
    start = next(index for index, word in enumerate(words) if word.rpartition("/")[2] == "megadsl")
    words = words[start + 1:]
    command, arguments = typer.main.get_command(app), words
    context = command.make_context("megadsl", list(arguments), resilient_parsing=False)
    while hasattr(command, "commands"):
        assert arguments and arguments[0] in command.commands, f"{page}: no verb {arguments[:1]}"
        command, arguments = command.commands[arguments[0]], arguments[1:]
        context = command.make_context(command.name, list(arguments), parent=context) if arguments else context
    monkeypatch.chdir(ROOT)
    if "arguments" in context.params and "CONFIG" not in line:
        config_from_arguments([*context.params["arguments"]])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_config_reference_is_current():
    import runpy

    tool = runpy.run_path(str(ROOT / "tools" / "document_config.py"))
    assert (ROOT / "docs" / "config.md").read_text(encoding="utf-8") == tool["document"]()
