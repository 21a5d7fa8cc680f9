"""Pages: what is data is escaped, nothing in a page asks the network, figures stand in it with ids of their own."""

import re

import numpy as np

from megadsl.monitor.pages.drawings import Curve, heat_map, lines
from megadsl.monitor.pages.page import Page, shown

HOSTILE = '<script>alert("x")</script>&\'"'


def every_part(text: str) -> Page:
    page = Page(text, text)
    page.section(text)
    page.heading(text)
    page.text(text)
    page.note(text, bad=True)
    page.points([text])
    page.facts({text: text})
    page.table([text, "n"], [[text, 1.5]], text)
    page.folded(text, text)
    page.verbatim(text)
    page.figures([lines(text, {text: Curve([0, 1], [1, 2]), "b": Curve([0, 1], [2, 1], "dashes", 1)}, text, text, caption=text)])
    page.foot(text)
    return page


def test_data_is_escaped_wherever_it_stands():
    html = every_part(HOSTILE).html()
    assert "<script" not in html and html.count("&lt;script&gt;alert") >= 15


def test_nothing_asks_the_network():
    page = every_part("http://example.org/a.png")
    page.figures([heat_map("map", np.arange(12.0).reshape(3, 4), "x", "y", log=True)])
    html = page.html()
    assert not re.search(r"""(?:src|href|action|data)=["'](?!#|data:)""", html)
    assert not re.search(r"url\((?!#)", html) and "@import" not in html and "xmlns" not in html
    assert "default-src 'none'" in html


def test_ids_are_unique_and_every_reference_has_its_target():
    page = Page("ids")
    page.figures([lines("a", {"a": Curve([0, 1], [1, 2])}, "x"), lines("a", {"a": Curve([0, 1], [1, 2])}, "x")])
    page.figures([heat_map("m", np.ones((2, 2)), "x", "y")])
    html = page.html()
    ids = re.findall(r'\bid="([^"]+)"', html)
    references = re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"', html)
    assert "\0" not in html and len(ids) == len(set(ids)) > 10
    assert {a or b for a, b in references} <= set(ids)


def test_figures_take_whatever_a_run_has():
    nothing = lines("nothing", {"a": Curve([], [])}, "x")
    missing = lines("missing", {"a": Curve([0, 1, 2], [float("nan"), 1.0, float("inf")])}, "x")
    negative = lines("negative", {"a": Curve([0, 1], [-1.0, 1.0])}, "x", log=None)
    empty = heat_map("empty", np.full((2, 3), np.nan), "x", "y", log=True)
    long = lines("long", {"a": Curve(np.arange(100_000), np.random.default_rng(0).random(100_000))}, "x")
    dollars = lines("dollars", {"$a_{$": Curve([0, 1], [1, 2]), "_b": Curve([0, 1], [2, 1])}, "$x$", "a\\$")
    assert "$a_{$" in dollars.svg and "_b" in dollars.svg and "$x$" in dollars.svg
    assert all("<svg" in one.svg for one in (nothing, missing, negative, empty)) and len(long.svg) < 60_000


def test_numbers_are_short():
    assert [shown(value) for value in (None, float("nan"), 1234567, 0.000123456, 12345.6, True, "a", float("inf"))] == [
        "–", "–", "1,234,567", "0.0001235", "12,346", "True", "a", "inf"]
