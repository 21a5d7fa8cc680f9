"""What the text tasks make of rows: sequences, windows, spans, metrics against examples worked out by hand; and how long a run is."""

import numpy as np
import pytest
import torch
from text_data import make, prepared, write_questions, write_sentences

from megadsl.errors import UserError
from megadsl.tasks.length import require_length, with_length
from megadsl.tasks.registry import resolved, task_of
from megadsl.tasks.text.metrics import answer_metrics, class_metrics, value_metrics
from megadsl.tasks.text.sequences import Markers, cut_first, cut_longest, sequence_of
from megadsl.tasks.text.windows import Span, WindowIndex, best_spans


def configured(small_data, data, task, **sections):
    model = {"family": "encoder", "num_layers": 2, "num_tokentypes": 2, **sections.pop("model", {})}
    return small_data.config("runs/none", model=model, task=task, data={"datasets": [str(data)]}, **sections)


def test_sequences_are_marked_and_cut_where_they_are_longest():
    a, b = np.arange(10, 16), np.arange(20, 23)
    sequence = sequence_of([a, b], Markers(1, 2), 12)
    assert sequence.tokens.tolist() == [1, *range(10, 16), 2, *range(20, 23), 2] and sequence.types.tolist() == [0] * 8 + [1] * 4
    assert sequence.offsets == (1, 8)
    decoder = sequence_of([a, b], Markers(None, 3), 9)
    assert decoder.tokens.tolist() == [10, 11, 12, 13, 3, 20, 21, 22, 3]
    assert [len(part) for part in cut_longest([a, b], 5)] == [3, 2] and [len(part) for part in cut_first([a, b], 7)] == [4, 3]


def test_windows_cover_a_context_and_spans_are_ranked():
    index = WindowIndex.of(np.array([4, 2]), np.array([20, 3]), length=16, markers=3, max_query=4, stride=5)
    # Room for 9 and 11 tokens of context: windows at 0, 5, 10, 15 hold 20 tokens; the last begins where the one before has 9 - 5 left.
    assert index.rows.tolist() == [0, 0, 0, 0, 1] and index.begins.tolist() == [0, 5, 10, 15, 0]
    start, end = np.array([9.0, 1.0, 5.0, 0.0, 2.0]), np.array([9.0, 0.0, 1.0, 4.0, 3.0])
    # Context: positions 2 to 4, numbers 7 to 9. Best 5 + 4; an end before its start and spans of more than 2 tokens do not count.
    assert best_spans(start, end, 2, 7, 3, 3, 2) == [Span(9.0, 7, 8), Span(6.0, 7, 7), Span(5.0, 9, 9)]


def test_answers_are_compared_as_squad_does():
    predictions = ["The  Cat!", "cat sat down", "", "dog", ""]
    answers = [["cat"], ["the cat", "a cat sat"], [], [], ["cat"]]
    # Exact: 1 and 3. F1: 1; of "cat sat down" against "cat sat" precision 2/3, recall 1, so 4/5; 1; 0; 0.
    found = answer_metrics("question_answering", predictions, answers)
    assert found == pytest.approx({"exact_match": 2 / 5, "f1": (1 + 0.8 + 1) / 5})


def test_class_and_value_metrics():
    labels, predicted = torch.tensor([1, 1, 1, 0, 0]), torch.tensor([1, 1, 0, 0, 1])
    found = class_metrics("text_classification", torch.nn.functional.one_hot(predicted, 2).double(), labels)
    # 2 right of 3 and 1 right of 2: true positives 2, false positives 1, false negatives 1, true negatives 1.
    mcc = (2 * 1 - 1 * 1) / (3 * 3 * 2 * 2) ** 0.5
    assert found == pytest.approx({"accuracy": 0.6, "f1": 2 / 3, "matthews_correlation": mcc, "majority_share": 0.6})
    values = value_metrics("text_classification", torch.tensor([1.0, 2.0, 4.0]).double(), torch.tensor([1.0, 3.0, 2.0]).double())
    # Deviations (-4/3, -1/3, 5/3) and (-1, 1, 0); ranks (1, 2, 3) and (1, 3, 2).
    assert values == pytest.approx({"pearson": 1.0 / (42 / 9 * 2) ** 0.5, "spearman": 0.5, "mean_squared_error": 5 / 3}, rel=1e-5)


def test_a_question_s_windows_hold_its_answer_where_they_say(small_data, tmp_path):
    data = prepared("question_answering", write_questions(tmp_path / "source", unanswerable=True), small_data.tokenizer, tmp_path / "out")
    task = task_of(configured(small_data, data, {"name": "question_answering", "doc_stride": 12, "max_query_length": 8}))
    task.check()
    dataset, arrays = task.splits(0).validation, task.prepared.split("validation")
    assert len(dataset) > len(arrays)
    answered = set()
    for number in range(len(dataset)):
        sample, row = dataset[number], int(task._index(arrays).rows[number])
        start, end = sample["spans"].tolist()
        text = task.tokenizer.decode(sample["tokens"][0, start:end + 1].tolist()).strip()
        if start:
            assert arrays.texts[row]["answers"] == [text]
            answered.add(row)
    assert answered == {row for row in range(len(arrays)) if arrays.texts[row]["answers"]} and len(answered) < len(arrays)
    assert dataset[len(dataset)]["spans"].tolist() == [-1, -1]


def test_an_epoch_has_every_row_once(small_data, tmp_path):
    task = task_of(configured(small_data, make("text_classification", tmp_path, small_data.tokenizer), {"name": "text_classification"}))
    train = task.splits(0).train
    orders = [[tuple(train[epoch * 96 + place]["tokens"][0].tolist()) for place in range(96)] for epoch in range(2)]
    assert sorted(orders[0]) == sorted(orders[1]) and orders[0] != orders[1]


def test_a_value_is_learnt_from_pairs(small_data, tmp_path, make_stack):
    data = prepared("text_classification", write_sentences(tmp_path / "source", pairs=True, value=True), small_data.tokenizer, tmp_path / "out")
    stack, _ = make_stack(configured(small_data, data, {"name": "text_classification"}))
    task, splits = stack.task, stack.task.splits(0)
    batch = task.collate([splits.validation[index] for index in (28, 29, 30)])
    assert batch["labels"].isnan().tolist() == [False, False, True] and task.counts(batch) == (2.0,)
    output = stack(stack.definition.inputs_of(batch))
    expected = (output["logits"][:2, 0] - batch["labels"][:2]).square().sum()
    assert task.loss(output, batch)[0].item() == pytest.approx(expected.item(), rel=1e-6)
    # Padding changes nothing.
    alone = task.collate([splits.validation[29]])
    assert stack(stack.definition.inputs_of(alone))["logits"][0].detach() == pytest.approx(output["logits"][1].detach(), abs=1e-5)


def test_epochs_and_shares_become_iterations(small_data, tmp_path):
    data = make("text_classification", tmp_path, small_data.tokenizer)
    config = configured(small_data, data, {"name": "text_classification"}, training={"train_epochs": 2.5}, optimizer={"lr_warmup_fraction": 0.1})
    found = resolved(config)
    assert (found.training.train_iters, found.optimizer.lr_warmup_iters) == (30, 3) and resolved(found) == found
    assert found.task.options["labels"] == ["0", "1"]
    with pytest.raises(UserError, match="is not worked out"):
        require_length(config, 96, "text_classification")
    assert with_length(config, None).training.train_iters == 20
    with pytest.raises(UserError, match="training.train_epochs does not go with task.name causal_language_modeling"):
        require_length(config, None, "causal_language_modeling")


@pytest.mark.parametrize("task, model, words", [
    ({"name": "text_classification", "pooling": "first"}, {"family": "decoder", "num_tokentypes": 0}, "task.pooling=first does not go with model.family decoder"),
    ({"name": "text_classification"}, {"family": "encoder_decoder"}, "does not go with model.family encoder_decoder; it is a task of encoder and decoder"),
    ({"name": "text_classification", "labels": ["a", "b"]}, {}, "task.labels are a, b, but .* has 0, 1; leave task.labels away"),
    ({"name": "text_classification"}, {"seq_length": 8}, "model.seq_length 8 is too short"),
    ({"name": "multiple_choice"}, {}, "was prepared by megadsl data text classification, but this task reads what megadsl data text choices makes"),
])
def test_what_does_not_fit_is_a_sentence(small_data, tmp_path, task, model, words):
    data = make("text_classification", tmp_path, small_data.tokenizer)
    with pytest.raises(UserError, match=words):
        task_of(configured(small_data, data, task, model=model)).check()


@pytest.mark.parametrize("sections, words", [
    ({"training": {"freeze_layers": 1}, "parallel": {"pipeline_model_parallel_size": 2}}, "do not go with parallel.pipeline_model_parallel_size 2"),
    ({"optimizer": {"layer_lr_decay": 0.9}, "parallel": {"pipeline_model_parallel_size": 2}}, "do not go with parallel.pipeline_model_parallel_size 2"),
    ({"training": {"freeze_layers": 3}}, "training.freeze_layers 3 is more than the model's 2 layers"),
])
def test_depth_options_that_do_not_fit(small_data, tmp_path, sections, words):
    with pytest.raises(UserError, match=words):
        configured(small_data, tmp_path, {"name": "text_classification"}, **sections)
