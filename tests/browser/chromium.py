"""Debian's chromium without a window: looks at a page at a given width and says what it found there."""

import html
import json
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

PROGRAM = shutil.which("chromium")
needs_chromium = pytest.mark.skipif(PROGRAM is None, reason="needs package chromium")

# The page stands in a frame of exactly the width that is asked for (a window has a smallest width) and is asked from outside: its
# own policy forbids scripts.
_FRAME = """<!doctype html><meta charset="utf-8"><iframe id="page" srcdoc="{page}" style="width:{width}px;height:4000px;border:0"></iframe>
<pre id="found"></pre><script>
document.getElementById("page").addEventListener("load", function () {{
  const seen = this.contentDocument, box = node => node.getBoundingClientRect();
  document.getElementById("found").textContent = JSON.stringify({{
    width: seen.documentElement.clientWidth, scrolled: seen.documentElement.scrollWidth,
    figures: [...seen.querySelectorAll("figure svg")].map(node => [box(node).width, box(node).height]),
    tables: [...seen.querySelectorAll("table")].map(node => node.rows.length),
    scrolling: [...seen.querySelectorAll(".scroll")].map(node => node.scrollWidth > node.clientWidth),
    headings: [...seen.querySelectorAll("h1, h2")].map(node => node.textContent), text: seen.body.innerText,
    scripts: seen.querySelectorAll("script").length,
    requests: this.contentWindow.performance.getEntriesByType("resource").map(entry => entry.name),
  }});
}});
</script>"""


@dataclass(frozen=True)
class Seen:
    """What a browser made of a page.

    Attributes:
        width, scrolled: of the window and of what it can be scrolled over.
        figures: (width, height) of each as it is drawn.
        tables: their numbers of rows; scrolling: whether a table is wider than its place.
        requests: addresses that were asked for.
    """

    width: int
    scrolled: int
    figures: list
    tables: list
    scrolling: list
    headings: list
    text: str
    scripts: int
    requests: list


def run(folder: Path, *arguments: str) -> str:
    """The program with a profile of its own under `folder`; what it prints."""
    done = subprocess.run([PROGRAM, "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}", *arguments],
                          capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    return done.stdout


def look(page: Path, width: int, folder: Path) -> Seen:
    """Open `page` in a window of `width`; `folder` is for files of the browser."""
    frame = folder / f"frame-{page.stem}-{width}.html"
    frame.write_text(_FRAME.format(page=html.escape(page.read_text(encoding="utf-8")), width=width), encoding="utf-8")
    dom = run(folder, "--virtual-time-budget=10000", "--dump-dom", frame.as_uri())
    found = re.search(r'<pre id="found">(.*?)</pre>', dom, flags=re.S)
    assert found and found[1], "the page did not load"
    return Seen(**json.loads(html.unescape(found[1])))


def screenshot(page: Path, width: int, height: int, path: Path, folder: Path) -> None:
    """A picture of the page, framed like in `look`."""
    frame = folder / f"picture-{page.stem}-{width}.html"
    frame.write_text(f'<!doctype html><style>body{{margin:0}}</style><iframe srcdoc="{html.escape(page.read_text(encoding="utf-8"))}" '
                     f'style="width:{width}px;height:{height}px;border:0"></iframe>', encoding="utf-8")
    run(folder, "--hide-scrollbars", f"--window-size={width},{height}", f"--screenshot={path}", frame.as_uri())
