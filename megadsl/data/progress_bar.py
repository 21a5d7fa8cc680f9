"""Progress of a long data job: a bar on a terminal; in a log a plain line every half minute and one at the end."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

_LOG_SECONDS = 30


@contextmanager
def progress(description: str, total: float, enabled: bool = True) -> Iterator[Callable[[float], None]]:
    """Gives `advance(amount)`; the bar goes to stderr so that stdout keeps the result."""
    if not enabled:
        yield lambda amount: None
        return
    start = time.monotonic()
    console = Console(file=sys.stderr)
    if console.is_terminal:
        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console, transient=True) as bars:
            task = bars.add_task(description, total=total)
            yield lambda amount: bars.advance(task, amount)
    else:
        shown = {"at": start, "amount": 0.0}

        def advance(amount: float) -> None:
            shown["amount"] += amount
            if time.monotonic() - shown["at"] > _LOG_SECONDS:
                shown["at"] = time.monotonic()
                print(f"{description}: {shown['amount'] / total:.0%}", file=sys.stderr, flush=True)

        yield advance
    print(f"{description}: done in {time.monotonic() - start:.1f} s", file=sys.stderr)
