"""Write the table of schemes in docs/theory.md from their docstrings: python tools/document_schemes.py (a test holds it current)."""

from pathlib import Path

from megadsl.schemes import SCHEMES

PATH = Path(__file__).resolve().parents[1] / "docs" / "theory.md"
START, END = "<!-- schemes: made by python tools/document_schemes.py -->\n", "<!-- end of schemes -->\n"


def table() -> str:
    """The table as Markdown."""
    lines = ["| `scheme` | what, from where | formula (N: norm, f: branch) | `model.norm_position` |", "|---|---|---|---|"]
    for name, scheme in SCHEMES.items():
        what, formula = scheme.description
        lines.append(f"| `{name}` | {what} | {formula} | {scheme.norm_position or 'pre or post'} |")
    return "\n".join(lines) + "\n"


def document(page: str) -> str:
    """The page with the table as it is now."""
    before, rest = page.split(START)
    return before + START + table() + END + rest.split(END)[1]


if __name__ == "__main__":
    PATH.write_text(document(PATH.read_text(encoding="utf-8")), encoding="utf-8")
    print(f"wrote {PATH}")
