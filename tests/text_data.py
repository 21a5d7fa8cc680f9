"""Small sources of the three finetuning tasks over short texts, made of words of the small tokenizer's corpus, with something to learn."""

import json
import random
from pathlib import Path

from megadsl.cli.data_text import choices, classification, questions

WORDS = "def class return import self for while email json async log handler parser header payload".split()
KINDS = {"text_classification": classification, "multiple_choice": choices, "question_answering": questions}


def words(rng: random.Random, low: int, high: int) -> list[str]:
    return [rng.choice(WORDS) for _ in range(rng.randint(low, high))]


def write_sentences(folder: Path, pairs: bool = False, value: bool = False) -> Path:
    """train.tsv and dev.tsv: the last word says the label (a pair's second text does)."""
    folder.mkdir(parents=True)
    rng = random.Random(1)
    header = ["sentence1", "sentence2", "score" if value else "gold_label"] if pairs else ["sentence", "label"]
    for split, count in (("train", 96), ("dev", 30), ("dev_mismatched", 22)):
        lines = ["\t".join(header)]
        for index in range(count):
            last = index % 2
            text = " ".join([*words(rng, 2, 6), ("bad", "good")[last]])
            label = f"{last + 0.5}" if value else ("no", "yes")[last] if pairs else str(last)
            lines.append("\t".join([" ".join(words(rng, 2, 4)), text, label] if pairs else [text, label]))
        (folder / f"{split}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def write_choices(folder: Path, options: int = 3) -> Path:
    """train.jsonl and dev.jsonl: the right option is the word that the passage begins with."""
    folder.mkdir(parents=True)
    rng = random.Random(2)
    for split, count in (("train", 64), ("dev", 18)):
        rows = []
        for _ in range(count):
            chosen = rng.sample(WORDS, options)
            answer = rng.randrange(options)
            rows.append({"passage": " ".join([chosen[answer], *words(rng, 2, 5)]), "question": "class", "options": chosen, "answer": "ABCDE"[answer]})
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def write_questions(folder: Path, unanswerable: bool = False) -> Path:
    """train.json and dev.json of SQuAD: the answer is the number behind the word that is asked for; contexts need several windows."""
    folder.mkdir(parents=True)
    rng = random.Random(3)
    for split, count in (("train", 40), ("dev", 14)):
        paragraphs = []
        for index in range(count):
            before, after, number = " ".join(words(rng, 3, 14)), " ".join(words(rng, 3, 14)), str(rng.randint(10, 99))
            context = f"{before} value {number} {after}"
            none = unanswerable and index % 3 == 2
            qas = [{"id": f"{split}-{index}", "question": "value", "is_impossible": none,
                    "answers": [] if none else [{"text": number, "answer_start": context.index(number)}]}]
            paragraphs.append({"context": context.replace(number, "none") if none else context, "qas": qas})
        (folder / f"{split}.json").write_text(json.dumps({"version": "1.1", "data": [{"title": "x", "paragraphs": paragraphs}]}), encoding="utf-8")
    return folder


def prepared(name: str, source: Path, tokenizer: Path, output: Path, **settings) -> Path:
    """`megadsl data text` of one task; the folder."""
    given = {"validation": None, "test": None, "skip_bad_rows": False}
    own = {"text_classification": {"layout": "auto", "text": [], "label": None, "labels": "", "value": False},
           "multiple_choice": {"options": None}, "question_answering": {}}[name]
    KINDS[name](source, tokenizer, output, **given | own | settings)
    return output


def make(name: str, folder: Path, tokenizer: Path) -> Path:
    """The prepared folder of a task, sources beside it."""
    write = {"text_classification": write_sentences, "multiple_choice": write_choices, "question_answering": write_questions}[name]
    return prepared(name, write(folder / "source"), tokenizer, folder / "prepared")
