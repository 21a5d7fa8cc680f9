"""Span corruption and infilling: source and target together are the window, lengths are exact, spans follow their laws."""

from collections import Counter

import numpy as np
import pytest
import torch

from megadsl.data.tokenizer import Tokenizer
from megadsl.tasks.language.lengths import spans_of
from megadsl.tasks.registry import task_of

SAMPLES = 300
# source length, noise density, mean span length
SHAPES = [(128, 0.15, 3.0), (100, 0.5, 3.0), (64, 0.3, 1.0), (128, 0.15, 10.0), (5, 0.15, 3.0)]


def pair_config(small_data, seq_length=128, target_length=None, **task):
    model = {"family": "encoder_decoder", "seq_length": seq_length, "decoder_seq_length": target_length}
    return small_data.config(small_data.folder / "run", model=model, task=task)


@pytest.fixture(scope="module")
def tokenizer(small_data):
    return Tokenizer.load(small_data.tokenizer)


def open_train(config):
    task = task_of(config)
    task.check()
    return task.splits(config.training.train_iters * config.training.global_batch_size).train


def samples(config, tokenizer, count=SAMPLES):
    """(raw window, sample) pairs; the windows hold every text token about equally often, so that tokens can be told apart."""
    task = task_of(config)
    task.check_pieces()
    objective, text = task.objective(), np.flatnonzero(tokenizer.is_text)
    for seed in range(count):
        rng = np.random.RandomState(seed)
        window = text[rng.randint(len(text), size=task.window.length)]
        yield window, objective(window, rng)


def spans_in(sample) -> list[np.ndarray]:
    """The labels of every noise span, by target_spans."""
    numbers = sample["target_spans"]
    return [sample["labels"][numbers == number] for number in np.unique(numbers[numbers > 0])]


@pytest.mark.parametrize("source, density, mean", SHAPES)
def test_source_with_its_spans_put_back_is_the_window(small_data, tokenizer, source, density, mean):
    config = pair_config(small_data, source, noise_density=density, mean_noise_span_length=mean)
    spans, sentinels = spans_of(source, density, mean), tokenizer.additional_special_tokens_ids
    for window, sample in samples(config, tokenizer, 50):
        read = sample["source_tokens"]
        assert len(read) == source and read[-1] == tokenizer.eos
        assert [token for token in read if token in sentinels] == sentinels[:spans.count]
        put_back = dict(zip(sentinels, spans_in(sample), strict=False))
        parts = [put_back[token] if token in put_back else [token] for token in read[:-1]]
        assert np.array_equal(np.concatenate(parts), window)


@pytest.mark.parametrize("source, density, mean", SHAPES)
def test_the_target_holds_every_span_behind_its_sentinel(small_data, tokenizer, source, density, mean):
    spans, length, sentinels = spans_of(source, density, mean), 150, tokenizer.additional_special_tokens_ids
    config = pair_config(small_data, source, length, noise_density=density, mean_noise_span_length=mean)
    for _, sample in samples(config, tokenizer, 50):
        labels, numbers = sample["labels"], sample["target_spans"]
        assert sample["loss_mask"].tolist() == [1.0] * spans.target + [0.0] * (length - spans.target)
        assert len(labels) == length and (labels[spans.target:] == tokenizer.pad).all()
        expected = [[sentinel, *span] for sentinel, span in zip(sentinels, spans_in(sample), strict=False)]
        assert labels[:spans.target].tolist() == [*np.concatenate(expected), tokenizer.eos]
        assert (numbers > 0).sum() == spans.noise and numbers.max() == spans.count
        assert sample["target_tokens"][0] == tokenizer.bos
        assert np.array_equal(sample["target_tokens"][1:spans.target], labels[:spans.target - 1])


def test_lengths_are_those_of_the_t5_code():
    # arXiv 1910.10683, random_spans_helper: inputs of 512 come from 568 tokens, with targets of 114.
    spans = spans_of(512, 0.15, 3.0)
    assert (spans.length, spans.target, spans.noise, spans.count) == (568, 114, 85, 28)


@pytest.mark.parametrize("density", [0.05, 0.15, 0.3, 0.5])
def test_the_source_is_filled_for_every_length(density):
    for source in range(3, 300):
        for mean in (1.0, 2.5, 3.0, 8.0):
            if density / mean > 0.9 * (1 - density):
                continue  # refused, see below
            spans = spans_of(source, density, mean)
            assert spans.source == source and 1 <= spans.count <= spans.noise and spans.count <= spans.length - spans.noise


def test_every_cut_into_spans_is_equally_likely(small_data, tokenizer):
    """A source of 16 is made from 19 tokens, 6 of them noise in 2 spans: 5 ways to cut the noise, 12 to cut the text."""
    config = pair_config(small_data, 16, noise_density=0.3)
    assert spans_of(16, 0.3, 3.0) == (19, 6, 2)
    seen = Counter()
    for _, sample in samples(config, tokenizer, 3000):
        gap = int(np.flatnonzero(sample["source_tokens"] == tokenizer.additional_special_tokens_ids[0])[0])
        seen[gap, len(spans_in(sample)[0])] += 1
    expected = 3000 / (12 * 5)
    assert len(seen) == 12 * 5
    chi_squared = sum((count - expected) ** 2 for count in seen.values()) / expected
    assert chi_squared < 59 + 4 * np.sqrt(2 * 59)


@pytest.fixture(scope="module", params=[(0.3, 3.0), (0.3, 1.5), (0.6, 6.0)], ids=str)
def infilled(small_data, tokenizer, request):
    density, mean = request.param
    config = pair_config(small_data, corruption="infilling", noise_density=density, mean_noise_span_length=mean)
    return density, mean, list(samples(config, tokenizer))


def test_infilling_predicts_the_whole_text(infilled, tokenizer):
    for window, sample in infilled[2]:
        assert np.array_equal(sample["labels"], [*window, tokenizer.eos]) and sample["loss_mask"].all()
        assert np.array_equal(sample["target_tokens"], [tokenizer.bos, *window])


def test_infilling_keeps_what_is_not_noise_in_order(infilled, tokenizer):
    """target_spans marks exactly the tokens that the source lacks, and a <mask> stands where they were."""
    for window, sample in infilled[2]:
        real = sample["source_segments"] == 1
        read, numbers = sample["source_tokens"][real], sample["target_spans"][:-1]
        assert np.array_equal(real, np.arange(128) < real.sum()) and (sample["source_tokens"][~real] == tokenizer.pad).all()
        assert read[-1] == tokenizer.eos and sample["target_spans"][-1] == 0
        assert np.array_equal(read[:-1][read[:-1] != tokenizer.mask], window[numbers == 0])
        # What stands left of mask k: kept tokens, and the spans before it.
        is_mask = read[:-1] == tokenizer.mask
        kept_left = np.cumsum(~is_mask)[is_mask]
        for number in np.unique(numbers[numbers > 0]):
            where = np.flatnonzero(numbers == number)
            assert np.array_equal(where, np.arange(where[0], where[-1] + 1))
            assert kept_left[number - 1] == (numbers[:where[0]] == 0).sum()


def test_infilling_hides_the_asked_share_in_poisson_spans(infilled, tokenizer):
    density, mean, pairs = infilled
    lengths = []
    for _, sample in pairs:
        noise = sample["target_spans"] > 0
        assert noise.sum() == round(density * 127)
        masks = int((sample["source_tokens"] == tokenizer.mask).sum())
        found = [len(span) for span in spans_in(sample)]
        assert len(found) <= masks <= noise.sum()
        lengths += found + [0] * (masks - len(found))  # a span of length 0 is a <mask> that hides nothing
    # A sample stops in the middle of its last span, so its lengths are free draws but for that one.
    stopped = SAMPLES / len(lengths)
    assert abs(np.mean(lengths) / mean - 1) < stopped + 4 / np.sqrt(mean * len(lengths))
    zeros, expected = lengths.count(0) / len(lengths), np.exp(-mean)
    assert abs(zeros - expected) < stopped * expected + 4 * np.sqrt(expected / len(lengths))


def test_infilling_puts_its_spans_anywhere(infilled, tokenizer):
    """Every arrangement of m spans among n source tokens is equally likely: each place holds a <mask> with probability m / n."""
    is_mask = [sample["source_tokens"][sample["source_segments"] == 1][:-1] == tokenizer.mask for _, sample in infilled[2]]
    shares = np.array([each.mean() for each in is_mask])
    for place in (0.0, 0.25, 0.5, 0.75, 1.0):
        there = sum(each[int(place * (len(each) - 1))] for each in is_mask)
        assert abs(there - shares.sum()) < 4 * np.sqrt((shares * (1 - shares)).sum()), place


def test_targets_differ_in_the_second_epoch(small_data):
    config = pair_config(small_data, 1024, corruption="infilling", noise_density=0.3)
    train = open_train(config)
    n = train.samples_per_epoch
    epochs = [[train[index] for index in range(start, start + n)] for start in (0, n)]
    first, second = ({each["labels"].numpy().tobytes(): each["source_tokens"] for each in epoch} for epoch in epochs)
    assert first.keys() == second.keys() and not any(torch.equal(first[key], second[key]) for key in first)


def test_windows_of_a_stream_do_not_overlap(small_data):
    """Every token of an epoch is read once: the windows of both objectives are as many as fit into the split."""
    tokens = (small_data.dataset / "train.bin").stat().st_size // 2
    for options, length in (({}, spans_of(128, 0.15, 3.0).length), ({"corruption": "infilling", "noise_density": 0.3}, 127)):
        config = pair_config(small_data, **options)
        assert open_train(config).samples_per_epoch == tokens // length
