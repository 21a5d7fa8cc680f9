"""Rows that cannot be used: one sentence that names file and row, or a count of them (--skip-bad-rows)."""

from collections.abc import Iterator
from contextlib import contextmanager

from megadsl.errors import UserError


class BadRow(Exception):
    """What is wrong with a row, as the second half of a sentence."""


class BadRows:
    """What becomes of them. `skipped` counts by reason, where they are left out."""

    def __init__(self, skip: bool):
        self.skip, self.count = skip, 0
        self.first: str | None = None

    @contextmanager
    def at(self, file, row: int | str) -> Iterator[None]:
        """Around the reading of one row; `row` counts from 1, without the header.

        Raises:
            UserError: the row is bad and bad rows are not skipped.
        """
        try:
            yield
        except BadRow as error:
            said = f"{file}, row {row}: {error}"
            if not self.skip:
                raise UserError(f"{said}; mend it, or leave such rows out with --skip-bad-rows.") from error
            self.count += 1
            self.first = self.first or said


def text_of(value, name: str) -> str:
    """A text that is not empty; BadRow otherwise."""
    if not isinstance(value, str) or not value.strip():
        raise BadRow(f"{name} is empty" if value in (None, "") or isinstance(value, str) else f"{name} is no text but {value!r:.40}")
    return value.strip()
