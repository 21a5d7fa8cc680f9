"""The pages in a real browser: whole, quiet, and no wider than the window, also on a phone."""

import os
import subprocess
import sys

import pytest
from chromium import look, needs_chromium, screenshot

pytestmark = needs_chromium


@pytest.fixture(scope="module")
def pages(trained_runs, tmp_path_factory) -> dict:
    """The three pages, as the command writes them."""
    folder = tmp_path_factory.mktemp("pages")
    calls = {
        "report": ["report", trained_runs["dslm"]], "compare": ["compare", *trained_runs.values()],
        "diagnose": ["diagnose", trained_runs["dslm"], "--samples", "4"],
    }
    for name, arguments in calls.items():
        subprocess.run([sys.executable, "-m", "megadsl", *map(str, arguments), "--output", str(folder / f"{name}.html")], check=True,
                       timeout=300, env=os.environ, capture_output=True)
    return {name: folder / f"{name}.html" for name in calls}


EXPECTED = {  # title, sections that must be there, figures at least
    "report": ("Run dslm", ["Signal: plan against measured", "Curves", "Alarms", "Checkpoints", "Configuration"], 7),
    "compare": ("Comparison: dslm, vanilla", ["Final numbers", "What they differ in", "Curves", "Signal over depth"], 9),
    "diagnose": ("Diagnosis of dslm", ["Found", "Moments by depth", "What layers are worth", "Attention by head", "Nearest plan"], 14),
}


@pytest.mark.parametrize("width", [1280, 400])
@pytest.mark.parametrize("name", EXPECTED)
def test_page(name, width, pages, tmp_path):
    seen = look(pages[name], width, tmp_path)
    title, sections, figures = EXPECTED[name]
    assert width - 20 <= seen.width <= width and seen.scrolled == seen.width, "the page is wider than its window"
    assert seen.headings[0] == title and set(sections) <= set(seen.headings)
    assert len(seen.figures) >= figures and all(250 < w <= seen.width and h > 100 for w, h in seen.figures)
    assert seen.tables and all(rows > 1 for rows in seen.tables)
    assert seen.requests == [] and seen.scripts == 0 and "NaN" not in seen.text and "undefined" not in seen.text
    if width == 400:
        assert any(seen.scrolling) or name == "compare", "a table is wider than a phone and scrolls by itself"


def test_a_picture_can_be_taken(pages, tmp_path):
    screenshot(pages["report"], 1280, 900, tmp_path / "report.png", tmp_path)
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG") and (tmp_path / "report.png").stat().st_size > 30_000


def test_a_page_that_is_too_wide_is_seen(tmp_path):
    (tmp_path / "wide.html").write_text("<!doctype html><body><pre>" + "x" * 400 + "</pre>")
    seen = look(tmp_path / "wide.html", 400, tmp_path)
    assert seen.scrolled > seen.width
