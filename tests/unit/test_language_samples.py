"""Training data: sample i depends on (seed, i) only; blends keep their proportions; a wrong dataset is refused at once."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from ranks import run_ranks
from small_data import make_corpus, make_dataset, make_tokenizer, run_config

from megadsl.data.dataset import Window, load_dataset
from megadsl.data.preprocess import preprocess
from megadsl.data.tokenizer import Tokenizer
from megadsl.data.windows import Windows
from megadsl.errors import UserError
from megadsl.tasks.registry import task_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = make_dataset(tmp_path_factory.mktemp("causal"))
    corpus = make_corpus(folder / "corpus2", "asyncio")
    preprocess(corpus, folder / "small.model", folder / "dataset2", workers=1)
    return folder


def open_run(config, train_samples=None):
    task = task_of(config)
    task.check()
    return task.splits(config.training.train_iters * config.training.global_batch_size if train_samples is None else train_samples)


def tokens(dataset, indices):
    return torch.stack([dataset[i]["tokens"] for i in indices])


def test_a_sample_is_a_piece_of_the_stream_and_its_continuation(folder):
    train = open_run(run_config(folder)).train
    sample = train[3]
    assert {key: (value.dtype, tuple(value.shape)) for key, value in sample.items()} == {
        "tokens": (torch.int64, (32,)), "labels": (torch.int64, (32,)), "loss_mask": (torch.float32, (32,)),
    }
    assert torch.equal(sample["tokens"][1:], sample["labels"][:-1]) and sample["loss_mask"].eq(1).all()


def test_an_epoch_reads_every_sequence_once_and_the_next_in_another_order(folder):
    train = open_run(run_config(folder)).train
    n = train.samples_per_epoch
    assert n == (load_dataset(folder / "dataset")["splits"]["train"]["tokens"] - 1) // 32
    first, second, third = (tokens(train, range(epoch * n, (epoch + 1) * n)) for epoch in range(3))
    key = {row.numpy().tobytes() for row in first}
    assert len(key) > 0.9 * n and {row.numpy().tobytes() for row in second} == key == {row.numpy().tobytes() for row in third}
    assert not torch.equal(first, second) and not torch.equal(second, third)
    # All tokens of the split but the last partial sequence, each once.
    every = Counter(np.fromfile(folder / "dataset/train.bin", dtype=np.uint16).tolist())
    assert sum((every - Counter(first.flatten().tolist())).values()) <= 33


def test_order_depends_on_the_seed_and_on_nothing_else_of_the_run(folder):
    blend = ({"path": str(folder / "dataset"), "weight": 3}, {"path": str(folder / "dataset2")})
    for datasets in ((), blend):
        reference = tokens(open_run(run_config(folder, *datasets)).train, range(100))
        for change in ({"train_iters": 500}, {"global_batch_size": 16}, {"micro_batch_size": 8}, {"eval_iters": 1}):
            assert torch.equal(reference, tokens(open_run(run_config(folder, *datasets, **change)).train, range(100))), change
        assert not torch.equal(reference, tokens(open_run(run_config(folder, *datasets, seed=5)).train, range(100)))


def test_validation_is_the_same_for_every_length_of_the_run(folder):
    reference = tokens(open_run(run_config(folder)).validation, range(16))
    assert torch.equal(reference, tokens(open_run(run_config(folder, train_iters=900)).validation, range(16)))
    assert not torch.equal(reference, tokens(open_run(run_config(folder)).test, range(16)))


def test_blend_keeps_its_proportions_and_the_order_of_its_parts(folder):
    datasets = ({"path": str(folder / "dataset"), "weight": 3}, {"path": str(folder / "dataset2"), "weight": 1})
    blend = open_run(run_config(folder, *datasets, train_iters=50)).train
    parts = [open_run(run_config(folder, dataset)).train for dataset in datasets]
    assert len(blend) == 400
    taken = [0, 0]
    for i in range(400):
        which = next(k for k in (0, 1) if torch.equal(blend[i]["tokens"], parts[k][taken[k]]["tokens"]))
        taken[which] += 1
        assert abs(taken[0] - 0.75 * (i + 1)) <= 1
    assert taken == [300, 100]


def test_blend_may_repeat_a_small_part(folder):
    small = open_run(run_config(folder)).train.samples_per_epoch
    iterations = small // 8 + 10
    datasets = ({"path": str(folder / "dataset"), "weight": 1e3}, {"path": str(folder / "dataset2"), "weight": 1})
    assert open_run(run_config(folder, *datasets, train_iters=iterations)).train[8 * iterations - 1]["tokens"].shape == (32,)


def _open_alone(config) -> bool:
    _ = open_run(config).train[0]
    return torch.distributed.is_initialized()


def test_opening_writes_only_the_index_and_needs_no_process_group(folder):
    index = folder / "dataset" / "index"
    before = sorted(path.as_posix() for path in Path(folder).rglob("*") if index not in (path, *path.parents))
    assert run_ranks(1, _open_alone, run_config(folder)) == [False]
    assert sorted(path.as_posix() for path in Path(folder).rglob("*") if index not in (path, *path.parents)) == before
    assert {path.suffix for path in index.rglob("*") if path.is_file()} <= {".npy", ".lock"}


def test_default_generator_is_untouched(folder):
    state = torch.get_rng_state()
    _ = open_run(run_config(folder)).train[10**6]
    assert torch.equal(state, torch.get_rng_state())


def test_wrong_datasets_are_refused_with_a_sentence(folder, tmp_path):
    other = make_tokenizer(folder / "corpus", tmp_path / "other.model", vocab_size=450)
    refused = {
        "data.datasets is empty": {"data": {"datasets": []}},
        "nowhere is no dataset": {"data": {"datasets": ["nowhere"]}},
        "made with another tokenizer .*; set tokenizer.model=": {"tokenizer": {"model": str(other)}},
        "cannot be read": {"tokenizer": {"model": "nothing.model"}},
        "train split of .* less than one sequence": {"model": {"seq_length": 10**6}},
        "validation split of .* less than one sequence": {"model": {"seq_length": 30_000}},
    }
    values = run_config(folder).model_dump()
    for words, change in refused.items():
        with pytest.raises(UserError, match=words):
            task_of(type(run_config(folder)).model_validate(values | change)).check()
    with pytest.raises(UserError, match="another tokenizer"):
        task_of(type(run_config(folder)).model_validate(values | {"tokenizer": {"model": str(other)}})).splits(8)


def test_validation_is_not_asked_for_when_it_is_not_used(folder):
    tokens_of = {split: counts["tokens"] for split, counts in load_dataset(folder / "dataset")["splits"].items()}
    assert tokens_of["validation"] < 30_000 < tokens_of["train"]
    config = run_config(folder, eval_iters=0)
    task_of(config.model_copy(update={"model": config.model.model_copy(update={"seq_length": 30_000})})).check()


def test_all_ranks_agree_without_talking(folder):
    """Two independent openings, as two ranks do it, give the same samples."""
    arguments = folder / "dataset", load_dataset(folder / "dataset"), "train", Window(32), 7, Tokenizer.load(folder / "small.model")
    first, second = Windows(*arguments), Windows(*arguments)
    beyond = 2 * first.samples_per_epoch
    assert all(np.array_equal(first[i]["window"], second[i]["window"]) for i in range(beyond, beyond + 50))


def test_a_resumed_blend_is_long_enough_and_keeps_its_order(folder):
    """A run that goes on with a smaller global batch has consumed more samples than train_iters times that batch."""
    datasets = ({"path": str(folder / "dataset"), "weight": 3}, {"path": str(folder / "dataset2")})
    config = run_config(folder, *datasets, train_iters=5)
    longer = open_run(config, train_samples=400).train
    shorter = open_run(config).train
    assert (len(shorter), len(longer)) == (40, 400)
    assert all(torch.equal(longer[index]["tokens"], shorter[index]["tokens"]) for index in range(40))
    assert longer[399]["tokens"].shape == (32,)
