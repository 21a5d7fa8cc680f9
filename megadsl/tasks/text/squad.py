"""Rows of span questions from SQuAD's JSON, v1.1 (arXiv 1606.05250) and v2 (arXiv 1806.03822: is_impossible)."""

import json
from collections.abc import Iterator
from pathlib import Path

from megadsl.errors import UserError
from megadsl.tasks.text.bad_rows import BadRow, BadRows, text_of
from megadsl.tasks.text.prepared import Row


def read_squad(path: Path, bad: BadRows) -> Iterator[Row]:
    """Rows of question and context, with the answers in it (none: it has no answer); `row` of a bad one is the question's id."""
    try:
        articles = json.loads(path.read_text(encoding="utf-8"))["data"]
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}).") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no JSON of SQuAD ({error!r:.60}): it holds no list under 'data'.") from error
    number = 0
    for article in articles:
        for paragraph in article.get("paragraphs", []):
            for question in paragraph.get("qas", []):
                number += 1
                with bad.at(path, question.get("id") or number):
                    yield _row(question, paragraph, number)


def _row(question: dict, paragraph: dict, number: int) -> Row:
    context = paragraph.get("context")
    text_of(context, "context")
    asked = text_of(question.get("question"), "question")
    answers = []
    for answer in [] if question.get("is_impossible") else question.get("answers", []):
        begin, text = answer.get("answer_start"), answer.get("text")
        if not isinstance(text, str) or not text.strip() or not isinstance(begin, int) or context[begin:begin + len(text)] != text or begin < 0:
            raise BadRow(f"the answer {text!r:.60} does not stand at character {begin} of the context")
        answers.append((begin, text))
    if not answers and not question.get("is_impossible"):
        raise BadRow("it has no answer and is not marked is_impossible")
    return Row([asked, context], answers=answers, name=str(question.get("id") or number))
