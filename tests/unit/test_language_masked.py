"""Masked tokens and sentence order: the shares, whole words, what is never masked, and that a sample is its window."""

import re

import numpy as np
import pytest
import torch

from megadsl.data.statistics import repeat_probability
from megadsl.data.tokenizer import Tokenizer
from megadsl.errors import UserError
from megadsl.tasks.registry import task_of
from megadsl.theory.inputs import TokenStatistics

SAMPLES = 400


def encoder_config(small_data, seq_length=128, num_tokentypes=0, **task):
    model = {"family": "encoder", "seq_length": seq_length, "num_tokentypes": num_tokentypes}
    return small_data.config(small_data.folder / "run", model=model, task=task)


def open_train(config):
    task = task_of(config)
    task.check()
    return task.splits(config.training.train_iters * config.training.global_batch_size).train


def read(config, count=SAMPLES, start=0) -> dict[str, np.ndarray]:
    """Samples `start` to `start` + `count` of the train split, stacked: [count, s] or [count]."""
    train = open_train(config)
    samples = [train[index] for index in range(start, start + count)]
    return {key: torch.stack([sample[key] for sample in samples]).numpy() for key in samples[0]}


@pytest.fixture(scope="module")
def tokenizer(small_data):
    return Tokenizer.load(small_data.tokenizer)


@pytest.fixture(scope="module", params=[False, True], ids=["pieces", "words"])
def masked(small_data, request):
    return request.param, read(encoder_config(small_data, masking_do_full_word=request.param))


def within(successes: int, trials: int, probability: float) -> bool:
    """Whether a count lies within 4 standard errors of a binomial law's mean."""
    return abs(successes - trials * probability) < 4 * np.sqrt(trials * probability * (1 - probability))


def test_fifteen_percent_of_the_text_is_predicted(masked, tokenizer):
    whole_words, batch = masked
    text, chosen = tokenizer.is_text[batch["labels"]].sum(axis=1), batch["loss_mask"].sum(axis=1)
    wanted = np.round(0.15 * text)
    if whole_words:
        # A sample stops short only where no word of the rest fits.
        assert (chosen <= wanted).all() and chosen.mean() > wanted.mean() - 0.5
    else:
        assert np.array_equal(chosen, wanted)


def test_of_the_chosen_80_percent_are_masked_10_random_10_kept(masked, tokenizer):
    _, batch = masked
    chosen = batch["loss_mask"] == 1
    read_there, true = batch["tokens"][chosen], batch["labels"][chosen]
    by_chance = 0.1 / tokenizer.is_text.sum()  # a random piece may be the true one
    counts = {0.8: (read_there == tokenizer.mask).sum(), 0.1 + by_chance: (read_there == true).sum()}
    counts[0.1 - by_chance] = chosen.sum() - sum(counts.values())
    assert all(within(count, chosen.sum(), share) for share, count in counts.items()), counts
    assert np.array_equal(batch["tokens"][~chosen], batch["labels"][~chosen])


def test_every_place_of_the_text_is_chosen_equally_often(masked, tokenizer):
    _, batch = masked
    text = tokenizer.is_text[batch["labels"]]
    rate = (batch["loss_mask"] * text).sum(axis=0)[1:-1] / text.sum(axis=0)[1:-1]
    error = np.sqrt(rate.mean() * (1 - rate.mean()) / SAMPLES)
    # 126 places: the largest of so many normal deviations is below 4.2 with probability 0.997.
    assert abs(rate - rate.mean()).max() < 4.2 * error


def test_control_pieces_are_neither_masked_nor_drawn(masked, tokenizer):
    _, batch = masked
    special = [tokenizer.cls, tokenizer.sep, tokenizer.pad, tokenizer.eod, tokenizer.bos, tokenizer.unk, tokenizer.mask]
    special += tokenizer.additional_special_tokens_ids
    chosen = batch["loss_mask"] == 1
    assert (batch["labels"] == tokenizer.eod).any(), "ends of documents are in the test's data"
    assert not np.isin(batch["labels"][chosen], special).any()
    drawn = batch["tokens"][chosen & (batch["tokens"] != batch["labels"]) & (batch["tokens"] != tokenizer.mask)]
    assert not np.isin(drawn, special).any() and len(np.unique(drawn)) > 100


def words(labels: np.ndarray, tokenizer: Tokenizer) -> list[list[int]]:
    """Positions of the pieces of every word (letters, digits, underscore) of the text, found in the text itself."""
    owner = [position for position, index in enumerate(labels) for _ in tokenizer.texts_of_pieces[index]]
    text = "".join(tokenizer.texts_of_pieces[index] for index in labels)
    return [sorted(set(owner[match.start():match.end()])) for match in re.finditer(r"[A-Za-z0-9_]+", text)]


def test_whole_words_are_whole_and_pieces_are_not(masked, tokenizer):
    whole_words, batch = masked
    broken = several = 0
    for labels, loss_mask in zip(batch["labels"], batch["loss_mask"], strict=True):
        for word in words(labels, tokenizer):
            several += len(word) > 1
            broken += 0 < loss_mask[word].sum() < len(word)
    assert several > 1000
    assert broken == 0 if whole_words else broken > 0.2 * several


@pytest.mark.parametrize("text, parts", [
    ("def parse_header(self, value):", ["def", " parse_header", "(", "self", ",", " value", "):"]),
    ("x = unfold\n\t# na\u00efve_1", ["x", " =", " unfold", "\n", "\t", "#", " na\u00efve_1"]),
])
def test_words_part_at_spaces_and_punctuation(small_data, tokenizer, text, parts):
    ids = np.array(tokenizer.encode(text))
    objectives = [
        task_of(encoder_config(small_data, len(ids) + 2, masking_do_full_word=True, masking_probability=share)).objective()
        for share in (0.1, 0.3, 0.5, 0.8)
    ]
    chosen = np.array([each(ids, np.random.RandomState(seed))["loss_mask"][1:-1] for each in objectives for seed in range(50)])
    # Between two words, and only there, one piece is sometimes chosen without the other.
    borders = np.flatnonzero((chosen[:, 1:] != chosen[:, :-1]).any(axis=0)) + 1
    ends = np.cumsum([len(tokenizer.texts_of_pieces[index].encode()) or 1 for index in ids])
    assert [0, *ends[borders - 1], ends[-1]] == [0, *np.cumsum([len(part.encode()) for part in parts])]


def test_at_least_one_place_is_predicted(small_data):
    config = encoder_config(small_data, seq_length=6, masking_probability=0.001, masking_do_full_word=True)
    assert (read(config)["loss_mask"].sum(axis=1) >= 1).all()


def test_a_sample_without_its_masks_is_the_window(small_data, tokenizer):
    config = encoder_config(small_data, seq_length=512)
    train = open_train(config)
    labels = np.stack([train[index]["labels"].numpy() for index in range(train.samples_per_epoch)])
    assert (labels[:, 0] == tokenizer.cls).all() and (labels[:, -1] == tokenizer.sep).all()
    stream = np.fromfile(small_data.dataset / "train.bin", dtype=np.uint16)
    found = {row[1:-1].astype(np.uint16).tobytes() for row in labels}
    # GPTDataset shuffles the documents; windows within one document are pieces of the split.
    one_document = [row[1:-1] for row in labels if tokenizer.eod not in row]
    data = stream.tobytes()
    assert len(one_document) > 10 and all(row.astype(np.uint16).tobytes() in data for row in one_document)
    assert len(found) > 0.95 * len(labels) and len(labels) == len(stream) // 510


def test_sentence_order_is_a_coin_and_both_orders_are_the_window(small_data, tokenizer):
    batch = read(encoder_config(small_data, num_tokentypes=2, sentence_order=True))
    windows = read(encoder_config(small_data, seq_length=127))["labels"][:, 1:-1]
    swapped = batch["sentence_order"]
    assert within(swapped.sum(), SAMPLES, 0.5) and set(swapped) == {0, 1}
    line_ends = 0
    for row in range(SAMPLES):
        labels, types = batch["labels"][row], batch["tokentypes"][row]
        boundary = int(types.sum())
        first, second = labels[:len(types) - boundary], labels[len(types) - boundary:]
        assert np.array_equal(types, np.sort(types)) and first[0] == tokenizer.cls
        assert first[-1] == second[-1] == tokenizer.sep and (labels == tokenizer.sep).sum() == 2
        parts = [first[1:-1], second[:-1]]
        assert all(len(part) >= 125 // 4 for part in parts)
        window = np.concatenate(parts[::-1] if swapped[row] else parts)
        assert np.array_equal(window, windows[row])
        line_ends += tokenizer.texts_of_pieces[(parts[1] if swapped[row] else parts[0])[-1]].endswith("\n")
    assert line_ends > 0.9 * SAMPLES, "a text is cut at the end of a line where it has one in its middle"


def test_the_second_epoch_masks_the_same_windows_anew(small_data):
    config = encoder_config(small_data, seq_length=1024)
    n = open_train(config).samples_per_epoch
    epochs = [read(config, n, start) for start in (0, n)]
    first, second = ({row.tobytes(): index for index, row in enumerate(epoch["labels"])} for epoch in epochs)
    assert first.keys() == second.keys()
    same = sum(np.array_equal(epochs[0]["loss_mask"][first[key]], epochs[1]["loss_mask"][second[key]]) for key in first)
    assert same == 0


def test_foreign_tokenizer_without_mask_is_a_sentence(small_data, tmp_path):
    import sentencepiece

    (tmp_path / "text.txt").write_text("one two three four five six seven eight nine ten\n" * 50)
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text.txt"), model_prefix=str(tmp_path / "foreign"), vocab_size=40, hard_vocab_limit=False,
        minloglevel=2,
    )
    config = encoder_config(small_data)
    foreign = config.model_copy(update={"tokenizer": config.tokenizer.model_copy(update={"model": str(tmp_path / "foreign.model")})})
    with pytest.raises(UserError, match="has no <mask> piece; make one that has it with megadsl tokenizer train"):
        task_of(foreign).check()


@pytest.mark.parametrize("probability", [0.15, 0.4])
@pytest.mark.parametrize("whole_words", [False, True], ids=["pieces", "words"])
def test_masked_text_repeats_as_the_plan_assumes(small_data, tokenizer, probability, whole_words):
    """pi_2 of what an encoder reads against that of the raw text: (1 - .8 f)^2 pi_2 + (.8 f)^2, and a little by random pieces."""
    batch = read(encoder_config(small_data, masking_probability=probability, masking_do_full_word=whole_words), 800)
    raw, masked, chosen = (batch[key][:, 1:-1] for key in ("labels", "tokens", "loss_mask"))
    before, after = (np.array([repeat_probability(row[None]) for row in rows]) for rows in (raw, masked))
    share, n = chosen.mean(), raw.shape[1]
    plan = TokenStatistics(int(tokenizer.is_text.sum()), before.mean(), masking_probability=share).input_repeats
    # The plan takes two positions for independent, f^2; a sample chooses k of n without putting back.
    k = chosen.sum(axis=1)
    expected = plan - 0.64 * (share**2 - (k * (k - 1)).mean() / (n * (n - 1)))
    error = (after - before).std() / np.sqrt(len(after))
    assert abs(after.mean() - expected) < 4 * error
    assert expected == pytest.approx(plan, rel=0.025) and abs(after.mean() - before.mean()) > 20 * error
