"""Which pins of constraints.txt have a wheel for which Python, as pip sees it from here; nothing of them is downloaded.

    python tools/check_python_versions.py [3.11 3.12 3.13]

Exit code 1 where a pin is not to be had at all. It takes some minutes and asks for this machine's platform. Only from 26.0 on does
`pip index versions` keep wheels and sources apart, so the question is put to such a pip in an environment of its own.
"""

import json
import subprocess
import sys
import tempfile
import venv
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from packaging.requirements import Requirement

CONSTRAINTS = Path(__file__).resolve().parents[1] / "constraints.txt"
PYTHONS = ["3.11", "3.12", "3.13"]
WHEEL, SOURCE, MISSING = "wheel", "source", "MISSING"


def pins(text: str) -> list[Requirement]:
    """The requirements of a constraints file (one a line, # begins a comment)."""
    lines = (line.partition("#")[0].strip() for line in text.splitlines())
    return [Requirement(line) for line in lines if line]


def how(pip: Path, pin: Requirement, python: str) -> str:
    """What the index has of a pin for one Python: a wheel, a source archive only, or nothing."""
    for kind, switch in ((WHEEL, "--only-binary=:all:"), (SOURCE, "--no-binary=:all:")):
        done = subprocess.run([pip, "index", "versions", pin.name, "--python-version", python, switch, "--pre", "--json"],
                              capture_output=True, text=True, timeout=300)
        if done.returncode and "No matching distribution" not in done.stderr:
            sys.exit(f"pip does not answer for {pin.name}: {done.stderr.strip()}")
        if done.returncode == 0 and any(pin.specifier.filter(json.loads(done.stdout)["versions"], prereleases=True)):
            return kind
    return MISSING


def table(answers: dict[Requirement, list[str]], pythons: list[str]) -> Iterator[str]:
    """Pins that are a wheel everywhere as one number, every other one as a row."""
    rows = [["pin", *(f"Python {python}" for python in pythons)]]
    rows += [[str(pin), *found] for pin, found in answers.items() if set(found) != {WHEEL}]
    rows += [[f"all {len(answers)} pins", *(f"{column.count(WHEEL)} wheels" for column in zip(*answers.values(), strict=True))]]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()


def main(pythons: list[str]) -> int:
    """Print the table; the exit code."""
    wanted = pins(CONSTRAINTS.read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        pip = Path(folder, "bin", "pip")
        subprocess.run([pip, "install", "--quiet", "--upgrade", "pip>=26.0"], check=True, timeout=300)
        # One Python after the other: the second finds the index pages of the first in pip's cache.
        with ThreadPoolExecutor(4) as threads:
            found = [list(threads.map(how, [pip] * len(wanted), wanted, [python] * len(wanted))) for python in pythons]
    answers = {pin: list(kinds) for pin, *kinds in zip(wanted, *found, strict=True)}
    print("\n".join(table(answers, pythons)))
    return int(any(MISSING in kinds for kinds in answers.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or PYTHONS))
