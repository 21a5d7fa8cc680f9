"""A page as one HTML file: headings, text, tables and inline figures. Nothing in it asks the network for anything, and a policy in its
head forbids it to; there is no script. Readable on a phone (tables scroll by themselves), in the dark and on paper.

Everything that is given as text is data and is escaped. Figures are SVG that drawings.py makes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from megadsl.data.atomic_files import written_atomically

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; --quiet: #777; --bad: #c0392b; }
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 0 auto; padding: 1rem; max-width: 76rem; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; margin: .2rem 0; } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; border-bottom: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.2rem 0 .3rem; } p { margin: .4rem 0; max-width: 60rem; } .quiet, figcaption, caption { color: var(--quiet); }
nav { display: flex; flex-wrap: wrap; gap: .2rem 1rem; margin: .6rem 0; font-size: .9rem; }
.note { border-left: 3px solid var(--line); padding-left: .7rem; color: var(--quiet); } .bad { border-color: var(--bad); color: inherit; }
.facts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 11rem), 1fr)); gap: .5rem; margin: .8rem 0; padding: 0; }
.facts div { background: var(--soft); padding: .4rem .6rem; border-radius: .3rem; }
ul { margin: .4rem 0; padding-left: 1.2rem; } .facts dt { color: var(--quiet); font-size: .8rem; } .facts dd { margin: 0; font-weight: 600; }
.scroll { overflow-x: auto; margin: .6rem 0; } table { border-collapse: collapse; font-size: .87rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding: .2rem 0; } th, td { padding: .2rem .8rem .2rem 0; text-align: right; vertical-align: top; overflow-wrap: normal; }
th { font-weight: 600; border-bottom: 1px solid var(--line); } td { border-bottom: 1px solid var(--soft); }
th.text, td.text { text-align: left; } td.long { min-width: 14rem; }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 22rem), 1fr)); gap: 1rem; margin: .8rem 0; }
figure { margin: 0; max-width: 40rem; break-inside: avoid; } figure svg { display: block; width: 100%; height: auto; } figcaption { font-size: .82rem; }
pre { overflow-x: auto; background: var(--soft); padding: .6rem; border-radius: .3rem; font-size: .82rem; overflow-wrap: normal; }
pre.wrapped { white-space: pre-wrap; overflow-wrap: anywhere; } summary { cursor: pointer; } footer { margin-top: 2rem; font-size: .82rem; }
@media print { body { max-width: none; font-size: 11px; } nav { display: none; } .scroll, pre { overflow: visible; } }
"""
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


@dataclass(frozen=True)
class Drawing:
    """A figure: <svg> as drawings.py makes it, what it shows in a sentence, and a short name for who cannot see it."""

    svg: str
    name: str
    caption: str = ""


class Page:
    """Collects the parts of a page in their order; `html` and `write` put them together."""

    def __init__(self, title: str, subtitle: str = ""):
        self._title, self._subtitle = title, subtitle
        self._parts: list[str] = []
        self._sections: list[str] = []
        self._figures, self._foot = 0, ""

    def section(self, title: str) -> None:
        """A new section, which the line of links at the top leads to."""
        self._sections.append(title)
        self._parts.append(f'<h2 id="s{len(self._sections)}">{escape(title)}</h2>')

    def heading(self, title: str) -> None:
        """A heading within a section."""
        self._parts.append(f"<h3>{escape(title)}</h3>")

    def text(self, text: str) -> None:
        self._parts.append(f"<p>{escape(text)}</p>")

    def points(self, lines: Sequence[str]) -> None:
        """A list, a sentence each."""
        self._parts.append("<ul>" + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>")

    def note(self, text: str, bad: bool = False) -> None:
        """A line at the side: what is missing, or (`bad`) what is wrong."""
        self._parts.append(f'<p class="note{" bad" if bad else ""}">{escape(text)}</p>')

    def facts(self, facts: dict[str, object]) -> None:
        """Numbers that stand out, by name; what is None is left out."""
        items = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(shown(value))}</dd></div>" for name, value in facts.items() if value is not None)
        self._parts.append(f'<dl class="facts">{items}</dl>')

    def table(self, head: Sequence[str], rows: Sequence[Sequence[object]], caption: str = "") -> None:
        """A table; it scrolls by itself where the window is narrow. A column that holds a text stands to the left."""
        text = [any(isinstance(row[column], str) for row in rows) for column in range(len(head))]

        def cell(tag: str, column: int, value: object) -> str:
            words = shown(value)
            kind = ["text"] * text[column] + ["long"] * (tag == "td" and len(words) > 40)
            return f"<{tag}{_class(kind)}>{escape(words)}</{tag}>"

        lines = ["".join(cell("th", *item) for item in enumerate(head)), *("".join(cell("td", *item) for item in enumerate(row)) for row in rows)]
        body = "".join(f"<tr>{line}</tr>" for line in lines)
        self._parts.append(f'<div class="scroll" tabindex="0"><table>{f"<caption>{escape(caption)}</caption>" * bool(caption)}{body}</table></div>')

    def figures(self, drawings: Sequence[Drawing]) -> None:
        """Figures beside each other, as many as the window is wide."""
        items = []
        for drawing in drawings:
            self._figures += 1
            # Ids are one name space in a page.
            svg = drawing.svg.replace("\0", f"f{self._figures}-").replace("<svg ", f'<svg role="img" aria-label="{escape(drawing.name)}" ', 1)
            items.append(f"<figure>{svg}<figcaption>{escape(drawing.caption or drawing.name)}</figcaption></figure>")
        self._parts.append(f'<div class="figures">{"".join(items)}</div>')

    def folded(self, summary: str, text: str, wrapped: bool = False) -> None:
        """Text as it is, behind a line that opens it."""
        self._parts.append(f"<details><summary>{escape(summary)}</summary>{_pre(text, wrapped)}</details>")

    def verbatim(self, text: str) -> None:
        """Text with its own line ends; long lines are wrapped."""
        self._parts.append(_pre(text, wrapped=True))

    def foot(self, text: str) -> None:
        """The last line: who made the page, and when."""
        self._foot = text

    def html(self) -> str:
        links = "".join(f'<a href="#s{number}">{escape(title)}</a>' for number, title in enumerate(self._sections, 1))
        subtitle = f'<p class="quiet">{escape(self._subtitle)}</p>' if self._subtitle else ""
        return (
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{escape(self._title)}</title><style>{_STYLE}</style></head><body>\n"
            f"<h1>{escape(self._title)}</h1>{subtitle}<nav>{links}</nav>\n" + "\n".join(self._parts) +
            f'\n<footer class="quiet">{escape(self._foot)}</footer></body></html>\n'
        )

    def write(self, path: Path) -> None:
        """Write the file; it appears when it is whole."""
        with written_atomically(path) as temporary:
            temporary.write_text(self.html(), encoding="utf-8")


def shown(value: object) -> str:
    """A value as a page shows it: numbers with four digits, what is missing as a dash."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int) or (abs(value) >= 1e4 and math.isfinite(value)):
        return f"{value:,.0f}" if abs(value) < 1e15 else f"{value:.3e}"
    return f"{value:.4g}"


def _class(kinds: list[str]) -> str:
    return f' class="{" ".join(kinds)}"' if kinds else ""


def _pre(text: str, wrapped: bool) -> str:
    return f'<pre tabindex="0"{_class(["wrapped"] * wrapped)}>{escape(text)}</pre>'
