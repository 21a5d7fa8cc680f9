"""Sources of the text tasks: layouts are read as they are, a bad row is one sentence that names file and row, or is counted."""

import json
from pathlib import Path

import numpy as np
import pytest
from text_data import prepared, write_choices, write_questions, write_sentences

from megadsl.data.tokenizer import Tokenizer
from megadsl.errors import UserError
from megadsl.tasks.text.prepared import PreparedText

CLASSIFICATION, CHOICE, QUESTIONS = "text_classification", "multiple_choice", "question_answering"


@pytest.mark.parametrize("header, row, texts, label", [
    ("index\tsentence1\tsentence2\tgold_label", "0\tA \"man\tIs he\tneutral", ['A "man', "Is he"], "neutral"),
    ("id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate", "1\t2\t3\tWhy?\tHow?\t1", ["Why?", "How?"], "1"),
    ("sentence\tlabel", "a film\t0", ["a film"], "0"),
])
def test_glue_layouts(small_data, tmp_path, header, row, texts, label):
    other = row.rsplit("\t", 1)[0] + "\tother"
    (tmp_path / "train.tsv").write_text(f"{header}\n{row}\n{other}\n", encoding="utf-8")
    (tmp_path / "dev.tsv").write_text(f"{header}\n{row}\n", encoding="utf-8")
    found = PreparedText(prepared(CLASSIFICATION, tmp_path, small_data.tokenizer, tmp_path / "out"), "classification")
    tokenizer, arrays = Tokenizer.load(small_data.tokenizer), found.split("validation")
    assert [tokenizer.decode(arrays.part(0, part).tolist()) for part in range(len(texts))] == texts
    assert found.labels[arrays.labels[0]] == label and set(found.labels) == {label, "other"}


def test_stsb_and_values(small_data, tmp_path):
    source = write_sentences(tmp_path / "source", pairs=True, value=True)
    found = PreparedText(prepared(CLASSIFICATION, source, small_data.tokenizer, tmp_path / "out"), "classification")
    assert found.labels == () and found.manifest["value"] and set(found.split("train").labels) == {0.5, 1.5}


def test_csv_and_jsonl_with_columns_of_ones_own(small_data, tmp_path):
    (tmp_path / "train.csv").write_text('body,mark\n"one, two",x\n"say ""it""",y\n', encoding="utf-8")
    (tmp_path / "dev.jsonl").write_text('{"body": "three", "mark": "y"}\n', encoding="utf-8")
    out = prepared(CLASSIFICATION, tmp_path / "train.csv", small_data.tokenizer, tmp_path / "out", text=["body"], label="mark",
                   validation=tmp_path / "dev.jsonl")
    arrays = PreparedText(out, "classification").split("train")
    assert Tokenizer.load(small_data.tokenizer).decode(arrays.part(1, 0).tolist()) == 'say "it"' and list(arrays.labels) == [0, 1]


def test_rows_without_a_validation_file_are_divided_by_their_text(small_data, tmp_path):
    rows = [{"text": f"text number {index % 150}", "label": index % 2} for index in range(300)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    out = prepared(CLASSIFICATION, tmp_path / "train.jsonl", small_data.tokenizer, tmp_path / "out")
    found = PreparedText(out, "classification")
    texts = {split: {found.split(split).part(row, 0).tobytes() for row in range(found.rows(split))} for split in ("train", "validation", "test")}
    assert sum(found.rows(split) for split in texts) == 300 and found.rows("train") > 200
    assert not texts["train"] & texts["test"] and not texts["train"] & texts["validation"]


BAD_ROWS = [
    ("a good text\n", "it has 1 fields, but the header has 2"),
    ("\t1\n", "column sentence is empty"),
    ("a text\t7\n", "column label holds the label '7', which is not one of 0, 1"),
]


@pytest.mark.parametrize("line, words", BAD_ROWS)
def test_a_bad_row_is_named_or_counted(small_data, tmp_path, line, words):
    source = write_sentences(tmp_path / "source")
    with (source / "dev.tsv").open("a", encoding="utf-8") as file:
        file.write(line)
    with pytest.raises(UserError, match=rf"dev.tsv, row 31: {words}; mend it, or leave such rows out with --skip-bad-rows\.$"):
        prepared(CLASSIFICATION, source, small_data.tokenizer, tmp_path / "out")
    manifest = PreparedText(prepared(CLASSIFICATION, source, small_data.tokenizer, tmp_path / "out", skip_bad_rows=True), "classification").manifest
    assert manifest["skipped_rows"] == 1 and manifest["splits"]["validation"] == 30 and "row 31" in manifest["first_skipped"]


@pytest.mark.parametrize("change, words", [
    ({"options": ["a", "b"]}, "it has 2 options, where 3 are wanted"), ({"options": "a"}, "options is no list"), ({"question": " "}, "question is empty"),
    ({"answer": "D"}, "answer 'D' names none of its 3 options"), ({"answer": 3}, "answer 3 names none"),
])
def test_a_bad_choice_is_named_or_counted(small_data, tmp_path, change, words):
    source = write_choices(tmp_path / "source")
    good = {"question": "q", "options": ["a", "b", "c"], "answer": 2}
    with (source / "train.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(good) + "\n" + json.dumps(good | change) + "\n")
    with pytest.raises(UserError, match=f"train.jsonl, row 66: {words}"):
        prepared(CHOICE, source, small_data.tokenizer, tmp_path / "out")
    found = PreparedText(prepared(CHOICE, source, small_data.tokenizer, tmp_path / "out", skip_bad_rows=True), "choices")
    assert found.manifest["skipped_rows"] == 1 and found.rows("train") == 65 and found.split("train").labels[64] == 2


def test_race_folders(small_data, tmp_path):
    for split in ("train", "dev"):
        (tmp_path / split / "high").mkdir(parents=True)
        article = {"article": "some text", "questions": ["one", "two _"], "options": [list("abcd")] * 2, "answers": ["B", "D"], "id": "x.txt"}
        (tmp_path / split / "high" / "1.txt").write_text(json.dumps(article), encoding="utf-8")
    found = PreparedText(prepared(CHOICE, tmp_path, small_data.tokenizer, tmp_path / "out"), "choices")
    assert found.rows("train") == 2 and list(found.split("validation").labels) == [1, 3] and found.manifest["parts"] == 6


def squad(context: str, **question) -> dict:
    return {"data": [{"paragraphs": [{"context": context, "qas": [{"id": "q1", "question": "what", **question}]}]}]}


@pytest.mark.parametrize("question, words", [
    ({"answers": [{"text": "colour", "answer_start": 1}]}, "the answer 'colour' does not stand at character 1 of the context"),
    ({"answers": []}, "it has no answer and is not marked is_impossible"), ({"question": "", "answers": []}, "question is empty"),
])
def test_a_bad_question_is_named_or_counted(small_data, tmp_path, question, words):
    source = write_questions(tmp_path / "source")
    (source / "dev.json").write_text(json.dumps(squad("the colour", **question)), encoding="utf-8")
    with pytest.raises(UserError, match=f"dev.json, row q1: {words}"):
        prepared(QUESTIONS, source, small_data.tokenizer, tmp_path / "out")
    found = PreparedText(prepared(QUESTIONS, source, small_data.tokenizer, tmp_path / "out", skip_bad_rows=True), "questions")
    assert found.manifest["skipped_rows"] == 1 and found.rows("validation") == 0


@pytest.mark.parametrize("context, answer", [("die Größe ist 7 \u2014 日本語 hier", "日本語"), ("a\u2581b \u2581\u2581 value 42\tend", "42"), ("x  Ärger  y", "Ärger")])
def test_an_answer_is_found_again_by_its_tokens(small_data, tmp_path, context, answer):
    for split in ("train", "dev"):
        (tmp_path / f"{split}.json").write_text(json.dumps(squad(context, answers=[{"text": answer, "answer_start": context.index(answer)}])))
    arrays = PreparedText(prepared(QUESTIONS, tmp_path, small_data.tokenizer, tmp_path / "out"), "questions").split("train")
    covered = arrays.characters_of(0, 1)
    first, last = arrays.labels[0]
    assert context[covered[first][0]:covered[last][1]].strip() == answer
    assert np.array_equal(arrays.part(0, 1), Tokenizer.load(small_data.tokenizer).encode(context))


@pytest.mark.parametrize("settings, words", [
    ({"text": ["sentense"]}, "train.tsv has no column sentense, only sentence, label; name its columns with --text and --label"),
    ({"labels": "0"}, "holds the label '1', which is not one of 0"), ({"value": True, "label": "sentence"}, "which is no finite number"),
])
def test_columns_and_labels_that_are_not_there(small_data, tmp_path, settings, words):
    with pytest.raises(UserError, match=words):
        prepared(CLASSIFICATION, write_sentences(tmp_path / "source"), small_data.tokenizer, tmp_path / "out", **settings)


def test_folders_that_are_none_or_of_another_kind(small_data, tmp_path):
    with pytest.raises(UserError, match="is no folder of prepared texts; make one with megadsl data text classification"):
        PreparedText(tmp_path, "classification")
    with pytest.raises(UserError, match=r"is no file and no folder with train\.tsv or"):
        prepared(CLASSIFICATION, tmp_path, small_data.tokenizer, tmp_path / "out")
    out = prepared(CHOICE, write_choices(tmp_path / "source"), small_data.tokenizer, tmp_path / "out")
    with pytest.raises(UserError, match="was prepared by megadsl data text choices, but this task reads what megadsl data text classification makes"):
        PreparedText(out, "classification")
    with pytest.raises(UserError, match="has no test split, only train, validation"):
        PreparedText(out, "choices").split("test")
    Path(out / "train.tokens.npy").write_bytes(b"")
    with pytest.raises(UserError, match="is damaged"):
        PreparedText(out, "choices")
