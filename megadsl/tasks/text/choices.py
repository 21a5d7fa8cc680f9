"""Rows of multiple choice: RACE's folders, and JSONL with passage (may be missing), question, options and answer.

RACE (arXiv 1704.04683): SPLIT/high/*.txt and SPLIT/middle/*.txt, each a JSON object with an article, questions, options and answers.
An answer is a letter, a number from 0, or the text of the right option.
"""

import json
import string
from collections.abc import Iterator
from pathlib import Path

from megadsl.errors import UserError
from megadsl.tasks.text.bad_rows import BadRow, BadRows, text_of
from megadsl.tasks.text.prepared import Row
from megadsl.tasks.text.tables import read_table


def read_choices(source: Path, num_options: int | None, bad: BadRows) -> Iterator[Row]:
    """Rows of passage, question and options of a .jsonl file or of one split's folder of RACE.

    Args:
        num_options: how many options every row has; None: as many as the first one.
    """
    rows = _race(source, bad) if source.is_dir() else _lines(source, bad)
    for file, number, fields in rows:
        with bad.at(file, number):
            row = _row(fields, num_options)
            num_options = num_options or len(row.parts) - 2
            yield row


def _lines(path: Path, bad: BadRows) -> Iterator[tuple[Path, int, dict]]:
    if path.suffix != ".jsonl":
        raise UserError(f"{path} is neither a .jsonl file nor a folder of RACE; give one of them.")
    for number, fields in read_table(path, bad)[1]:
        yield path, number, fields


def _race(folder: Path, bad: BadRows) -> Iterator[tuple[Path, int, dict]]:
    files = sorted(folder.rglob("*.txt"))
    if not files:
        raise UserError(f"{folder} holds no .txt files of RACE.")
    for file in files:
        with bad.at(file, 1):
            try:
                article = json.loads(file.read_text(encoding="utf-8"))
                questions = list(zip(article["questions"], article["options"], article["answers"], strict=True))
            except (ValueError, KeyError, TypeError) as error:
                raise BadRow(f"it is no article of RACE ({error!r:.60})") from error
            for number, (question, options, answer) in enumerate(questions, start=1):
                yield file, number, {"passage": article["article"], "question": question, "options": options, "answer": answer}


def _row(fields: dict, num_options: int | None) -> Row:
    options, passage = fields.get("options"), fields.get("passage") or ""
    if not isinstance(options, list) or len(options) < 2:
        raise BadRow(f"options is no list of two or more texts but {options!r:.40}")
    if num_options is not None and len(options) != num_options:
        raise BadRow(f"it has {len(options)} options, where {num_options} are wanted")
    texts = [text_of(option, f"option {index}") for index, option in enumerate(options)]
    return Row([str(passage).strip(), text_of(fields.get("question"), "question"), *texts], _answer(fields.get("answer"), texts))


def _answer(answer, options: list[str]) -> int:
    """A letter counts before a text: the options may be letters themselves."""
    number = answer if isinstance(answer, int) and not isinstance(answer, bool) else -1
    if isinstance(answer, str):
        letter = answer.strip().upper()
        number = string.ascii_uppercase.find(letter) if len(letter) == 1 and letter.isalpha() else int(letter) if letter.isdecimal() else -1
        if answer.strip() in options and not 0 <= number < len(options):
            number = options.index(answer.strip())
    if not 0 <= number < len(options):
        raise BadRow(f"answer {answer!r:.40} names none of its {len(options)} options")
    return number
