"""What only a GPU can show, in one command: the product's own commands on it, held against the CPU, the plan and stock Megatron-core.

    python tools/gpu_check.py [--device auto|cuda|cpu] [--output gpu-check.json] [--only CHECK ...] [--keep FOLDER]

Prints one table and writes it as JSON, with the machine; exit code 1 where a row failed. A check that crashes is a row that says
so; the others go on. On one H100 it is meant to take under ten minutes. `--device cpu` runs a small form of everything, which the
tests do, so that the tool does not rot where there is no GPU. Every check runs `megadsl` commands in processes of its own
(gpu_checks/), because a process takes one device for good. docs/gpu.md says what each row is there for.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

from gpu_checks.checks import CHECKS, TIMED
from gpu_checks.machine import FULL, SMALL, Failed, Machine, Row, describe, prepare


def run_check(name: str, check: Callable[[Machine], Iterator[Row]], machine: Machine) -> list[Row]:
    """The rows of one check; whatever goes wrong in it is a row."""
    begun, rows = time.perf_counter(), []
    try:
        for row in check(machine):
            rows.append(row)
    except Exception as error:  # a check must not take the others with it
        rows.append(Row(name, "the check itself", f"{type(error).__name__}: {error}", "it runs to its end", False))
    return [replace(row, check=name, seconds=round(time.perf_counter() - begun, 1)) for row in rows]


def print_table(rows: Iterable[Row], title: str) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for column in ("check", "what", "measured", "wanted", ""):
        table.add_column(column, overflow="fold")
    last = None
    for row in rows:
        verdict = {True: "ok", False: "[bold]FAILED[/bold]", None: "-"}[row.passed]
        check, last = "" if row.check == last else f"{row.check}, {row.seconds:.0f} s", row.check
        table.add_row(check, row.what, row.measured.replace("[", r"\["), row.wanted, verdict)
    Console(width=None if Console().is_terminal else 160).print(table)


def run_checks(machine: Machine, only: Sequence[str]) -> list[Row]:
    chosen = {name: check for name, check in CHECKS.items() if not only or name in only}
    with ThreadPoolExecutor(machine.size.workers) as pool:
        waiting = [pool.submit(run_check, name, check, machine) for name, check in chosen.items() if name not in TIMED]
        rows = [row for one in waiting for row in one.result()]
    for name in TIMED:
        if name in chosen:
            rows += run_check(name, chosen[name], machine)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto", help="auto: a GPU where there is one")
    parser.add_argument("--output", type=Path, default=Path("gpu-check.json"), help="JSON of the machine and all rows")
    parser.add_argument("--only", nargs="*", choices=list(CHECKS), default=[], help="run these checks alone")
    parser.add_argument("--keep", type=Path, help="new folder for corpus, runs and logs; else a temporary one")
    options = parser.parse_args()
    if options.keep and options.keep.is_dir() and any(options.keep.iterdir()):
        # What an earlier check has trained there would be resumed, and nothing would be checked.
        print(f"gpu_check: {options.keep} is not empty; give --keep a new folder.", file=sys.stderr)
        return 2
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.keep.resolve() if options.keep else Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            found = describe(options.device, folder)
            size = FULL if found["device"] == "cuda" else SMALL
            machine = Machine(found["device"], found["count"], found["name"], folder, size)
            prepare(machine)
        except Failed as error:
            print(f"gpu_check: nothing could be checked: {error}", file=sys.stderr)
            return 1
        rows = run_checks(machine, options.only)
    failed = sum(row.passed is False for row in rows)
    print_table(rows, f"{found['count']} x {found['name']}, torch {found['torch']}: {failed} of {len(rows)} rows failed, "
                      f"{time.perf_counter() - begun:.0f} s")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps({"machine": found, "rows": [asdict(row) for row in rows]}, indent=1), encoding="utf-8")
    print(f"wrote {options.output}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
