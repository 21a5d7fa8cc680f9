"""Dataset: what Megatron reads back is the corpus, whatever the number of workers; its statistics are what they say."""

import json
import math
import os

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset
from small_data import make_corpus, make_dataset, make_tokenizer

from megadsl.data.corpus import SPLITS, build_corpus, read_split
from megadsl.data.dataset import load_dataset
from megadsl.data.preprocess import preprocess
from megadsl.data.statistics import repeat_probability, write_statistics
from megadsl.data.tokenizer import Tokenizer
from megadsl.data.worker_pool import ordered_map
from megadsl.errors import UserError

OUTPUTS = [f"{split}.{kind}" for split in SPLITS for kind in ("bin", "idx")] + ["tokenizer.model", "stats.json"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("preprocess"))


def test_megatron_reads_back_every_document(folder):
    manifest, tokenizer = load_dataset(folder / "dataset"), Tokenizer.load(folder / "small.model")
    for split in SPLITS:
        indexed = IndexedDataset(str(folder / "dataset" / split))
        texts = list(read_split(folder / "corpus", split))
        assert len(indexed) == len(texts) == manifest["splits"][split]["documents"] > 0
        assert indexed.index.dtype == np.uint16
        for ids, text in zip(indexed, texts, strict=True):
            assert ids[-1] == tokenizer.eod and tokenizer.decode(ids[:-1].tolist()) == text
        assert manifest["splits"][split]["tokens"] == indexed.sequence_lengths.sum()
        assert manifest["splits"][split]["text_bytes"] == sum(len(text.encode()) for text in texts)
    assert manifest["tokenizer_sha256"] == tokenizer.sha256 == Tokenizer.load(folder / "dataset/tokenizer.model").sha256


@pytest.mark.parametrize("workers", [2, 3])
def test_bytes_do_not_depend_on_workers(folder, tmp_path, workers, monkeypatch):
    # Several batches per worker even from this small corpus; and so another batch size than the fixture's.
    monkeypatch.setattr("megadsl.data.preprocess._BATCH_CHARS", 10_000)
    preprocess(folder / "corpus", folder / "small.model", tmp_path / "out", workers=workers)
    for name in OUTPUTS:
        assert (tmp_path / "out" / name).read_bytes() == (folder / "dataset" / name).read_bytes(), name


def test_large_vocabulary_is_written_as_int32(tmp_path, monkeypatch):
    corpus = make_corpus(tmp_path / "corpus", "json")
    tokenizer = make_tokenizer(corpus, tmp_path / "t.model", vocab_size=400)
    monkeypatch.setattr(Tokenizer, "load", lambda path: _Large((tmp_path / "t.model").read_bytes(), str(path)))
    manifest, _ = preprocess(corpus, tokenizer, tmp_path / "out", workers=1)
    indexed = IndexedDataset(str(tmp_path / "out/train"))
    assert manifest["dtype"] == "int32" and indexed[0].dtype == np.int32 and indexed[0].min() >= 3


class _Large(Tokenizer):
    """The same tokenizer with ids that need more than 16 bits."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.vocab_size += 70_000

    def encode(self, text):
        return [index + 70_000 for index in super().encode(text)]


def test_reuse_only_of_what_is_complete_and_equal(folder, tmp_path):
    arguments = folder / "corpus", folder / "small.model", tmp_path / "out"
    first, reused = preprocess(*arguments, workers=1)
    assert not reused and preprocess(*arguments, workers=1) == (first, True)
    (tmp_path / "out/validation.bin").write_bytes(b"cut")
    with pytest.raises(UserError, match="damaged"):
        load_dataset(tmp_path / "out")
    assert preprocess(*arguments, workers=1) == (first, False)
    (tmp_path / "out/dataset.json").unlink()
    with pytest.raises(UserError, match="is no dataset"):
        load_dataset(tmp_path / "out")
    other = make_tokenizer(folder / "corpus", tmp_path / "other.model", vocab_size=450)
    assert preprocess(folder / "corpus", other, tmp_path / "out", workers=1)[1] is False
    with pytest.raises(UserError, match="another tokenizer"):
        load_dataset(tmp_path / "out", first["tokenizer_sha256"])
    assert not [path for path in (tmp_path / "out").iterdir() if path.name.startswith(".")]


def test_a_source_instead_of_a_corpus(folder, tmp_path):
    (tmp_path / "text").mkdir()
    for number in range(40):
        (tmp_path / f"text/{number}.txt").write_text(f"document {number}\n" * 30)
    manifest, _ = preprocess(tmp_path / "text", folder / "small.model", tmp_path / "out", workers=1)
    assert sum(counts["documents"] for counts in manifest["splits"].values()) == 40


def test_empty_splits(folder, tmp_path):
    (tmp_path / "a.txt").write_text("one document only " * 50)
    build_corpus([str(tmp_path / "a.txt")], tmp_path / "train", fractions=(1, 0, 0))
    manifest, _ = preprocess(tmp_path / "train", folder / "small.model", tmp_path / "out", workers=1)
    assert manifest["splits"]["validation"]["tokens"] == 0 and not (tmp_path / "out/validation.bin").exists()
    assert json.loads((tmp_path / "out/stats.json").read_text())["validation_unigram_cross_entropy"] is None
    load_dataset(tmp_path / "out")
    build_corpus([str(tmp_path / "a.txt")], tmp_path / "test", fractions=(0, 0, 1))
    with pytest.raises(UserError, match="train split of .* is empty"):
        preprocess(tmp_path / "test", folder / "small.model", tmp_path / "out2", workers=1)


def test_statistics_are_what_they_say(folder):
    statistics = write_statistics(folder / "dataset", seq_length=64)
    train = np.fromfile(folder / "dataset/train.bin", dtype=np.uint16)
    validation = np.fromfile(folder / "dataset/validation.bin", dtype=np.uint16)
    p = np.bincount(train, minlength=statistics["vocab_size"]) / len(train)
    assert statistics["num_tokens"] == len(train)
    assert statistics["repeat_probability"] == pytest.approx((p**2).sum())
    assert statistics["unigram_entropy"] == pytest.approx(-sum(q * math.log(q) for q in p if q))
    smoothed = (p * len(train) + 1) / (len(train) + len(p))
    assert statistics["validation_unigram_cross_entropy"] == pytest.approx(-np.log(smoothed[validation]).mean())
    text_bytes = sum(len(text.encode()) for text in read_split(folder / "corpus", "train"))
    assert statistics["bytes_per_token"] == pytest.approx(text_bytes / len(train))
    assert statistics["repeat_probability_in_sequence"] > 1.2 * statistics["repeat_probability"], "text repeats itself locally"
    assert json.loads((folder / "dataset/stats.json").read_text()) == statistics
    longer = write_statistics(folder / "dataset", seq_length=128)
    assert longer["seq_length"] == 128
    assert longer["repeat_probability_in_sequence"] != statistics["repeat_probability_in_sequence"]


def test_repeat_probability_counts_pairs():
    sequences = np.random.default_rng(0).integers(0, 7, (50, 20))
    pairs = [row[i] == row[j] for row in sequences for i in range(20) for j in range(20) if i != j]
    assert repeat_probability(sequences) == pytest.approx(np.mean(pairs))
    # Neighbouring rows that end and begin with the same token are not a repeat.
    assert repeat_probability(np.array([[1, 2], [2, 3]])) == 0.0 and repeat_probability(np.full((3, 5), 4)) == 1.0


def test_a_killed_worker_is_a_sentence_and_not_a_hang():
    with pytest.raises(UserError, match="fewer --workers"), ordered_map(2) as run:
        list(run(os._exit, [1, 1, 1]))


def test_work_in_order_never_runs_far_ahead_of_its_reader():
    taken = []
    with ordered_map(2) as run:
        results = run(abs, (taken.append(i) or -i for i in range(1000)))
        assert [next(results) for _ in range(10)] == list(range(10)) and len(taken) < 20
        assert list(results) == list(range(10, 1000))
