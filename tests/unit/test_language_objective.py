"""Every objective: samples do not depend on the layout; documents are told apart; what does not fit is a sentence."""

import numpy as np
import pytest
import torch

from megadsl.config.load import load_config, save_config
from megadsl.data.sampler import MicroBatches
from megadsl.data.tokenizer import Tokenizer
from megadsl.errors import UserError
from megadsl.tasks.language.causal_samples import segments_of
from megadsl.tasks.registry import task_of

PACKED = {"reset_attention_mask": True, "reset_position_ids": True}
OBJECTIVES = {
    "causal": ({}, {}),
    "prefix": ({}, {"prefix_lm": True, "eod_mask_loss": True, **PACKED}),
    "masked": ({"family": "encoder"}, PACKED),
    "whole words, order": ({"family": "encoder", "num_tokentypes": 2}, {"masking_do_full_word": True, "sentence_order": True}),
    "span corruption": ({"family": "encoder_decoder"}, {}),
    "infilling": ({"family": "encoder_decoder"}, {"corruption": "infilling", "noise_density": 0.3}),
}


def objective_config(small_data, name, seq_length=32, **task):
    model, options = OBJECTIVES[name]
    return small_data.config(small_data.folder / "run", model=model | {"seq_length": seq_length}, task=options | task)


def open_train(config):
    task = task_of(config)
    task.check()
    return task.splits(config.training.train_iters * config.training.global_batch_size).train


@pytest.fixture(scope="module")
def tokenizer(small_data):
    return Tokenizer.load(small_data.tokenizer)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_sample_holds_the_tensors_that_the_model_is_told_of(small_data, name):
    config = objective_config(small_data, name)
    sample = open_train(config)[5]
    task = task_of(config)
    assert tuple(sample) == (*task.inputs, *task.targets)
    lengths = {"prefix_length": (), "sentence_order": ()}
    for key, tensor in sample.items():
        assert tensor.dtype == (torch.float32 if key == "loss_mask" else torch.int64)
        assert tuple(tensor.shape) == lengths.get(key, (32,))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_samples_do_not_depend_on_readers_ranks_or_where_a_run_began(small_data, name):
    config = objective_config(small_data, name)
    train = open_train(config)
    # Across the border of two epochs, where windows come again with other masks.
    start = train.samples_per_epoch - 20
    expected = [train[start + index] for index in range(48)]

    def read(consumed=0, rank=0, ranks=1, workers=0):
        """The samples of this rank from `consumed` on, by their place in the run."""
        # A fresh dataset, as another process would open it.
        batches = MicroBatches(
            open_train(config), consumed_samples=start + consumed, micro_batch_size=4, global_batch_size=8, data_parallel_rank=rank,
            data_parallel_size=ranks, num_workers=workers, num_samples=48 - consumed,
        )
        for number, batch in enumerate(batches):
            first = consumed + 4 * (number * ranks + rank)
            for row in range(4):
                yield first + row, {key: tensor[row] for key, tensor in batch.items()}
        batches.close()

    for reads in ([read()], [read(workers=2)], [read(rank=0, ranks=2), read(rank=1, ranks=2)], [read(consumed=24)]):
        found = [pair for one in reads for pair in one]
        assert len(found) == (48 if found[0][0] == 0 else 24)
        assert len({index for index, _ in found}) == len(found)
        for index, sample in found:
            assert all(torch.equal(sample[key], expected[index][key]) for key in expected[index])


@pytest.mark.parametrize("name", [name for name in OBJECTIVES if name != "causal"])
def test_the_seed_changes_what_is_hidden(small_data, name):
    config = objective_config(small_data, name)
    other = config.model_copy(update={"training": config.training.model_copy(update={"seed": config.training.seed + 1})})
    first, second = ([open_train(each)[index]["labels"] for index in range(20)] for each in (config, other))
    assert not any(torch.equal(left, right) for left, right in zip(first, second, strict=True))


def test_a_document_ends_with_its_eod():
    eod = 3
    assert segments_of(np.array([5, 6, 3, 7, 3, 3, 8]), eod).tolist() == [1, 1, 1, 2, 2, 3, 4]
    assert segments_of(np.array([3, 5]), eod).tolist() == [1, 2]


@pytest.mark.parametrize("name", ["prefix", "masked"])
def test_segments_number_the_documents_of_a_sequence(small_data, tokenizer, name):
    train = open_train(objective_config(small_data, name, seq_length=256))
    several = 0
    for index in range(300):
        sample = train[index]
        text = sample["tokens"] if name == "prefix" else sample["labels"]
        segments = sample["segments"]
        assert segments[0] == 1 and segments[-1] == 1 + (text[:-1 if name == "prefix" else -2] == tokenizer.eod).sum()
        # A new document begins behind an eod and nowhere else; <sep> belongs to what stands before it.
        starts = torch.diff(segments)[:len(text) - (1 if name == "prefix" else 2)]
        assert torch.equal(starts == 1, text[:len(starts)] == tokenizer.eod) and set(starts.tolist()) <= {0, 1}
        assert name == "prefix" or segments[-1] == segments[-2]
        several += bool(segments[-1] > 1)
    assert several > 5


def test_a_prefix_is_read_and_not_predicted(small_data):
    train = open_train(objective_config(small_data, "prefix", eod_mask_loss=False))
    lengths = []
    for index in range(600):
        sample = train[index]
        prefix = int(sample["prefix_length"])
        # The last token of the prefix predicts the first behind it.
        assert sample["loss_mask"].tolist() == [0.0] * (prefix - 1) + [1.0] * (32 - prefix + 1)
        lengths.append(prefix)
    assert set(lengths) == set(range(1, 32)), "uniform on 1 ... s - 1, so that something is left to predict"
    assert abs(np.mean(lengths) - 16) < 4 * np.sqrt((31**2 - 1) / 12 / 600)


def test_eod_mask_loss_leaves_out_what_follows_a_document(small_data, tokenizer):
    configs = [objective_config(small_data, "causal", 256, eod_mask_loss=masked) for masked in (False, True)]
    with_loss, without = map(open_train, configs)
    ends = 0
    for index in range(300):
        sample, masked = with_loss[index], without[index]
        assert sample["loss_mask"].all() and torch.equal(sample["tokens"], masked["tokens"])
        assert torch.equal(masked["loss_mask"] == 0, masked["tokens"] == tokenizer.eod)
        ends += int((masked["tokens"] == tokenizer.eod).sum())
    assert ends > 5


REFUSED = [
    ("span corruption", ["model.decoder_seq_length=7"], r"seq_length 7 is too short .* set model.decoder_seq_length=8\.$"),
    ("infilling", ["model.decoder_seq_length=31"], r"seq_length 31 is too short .* set model.decoder_seq_length=32\.$"),
    ("span corruption", ["model.seq_length=1024"], r"needs 57 sentinels, .* has 32; .* --num-sentinels 57, or set"),
    ("span corruption", ["task.noise_density=0.6", "task.mean_noise_span_length=1"], "too few tokens between the spans; lower"),
    ("span corruption", ["model.seq_length=2"], r"2 is too short for this objective; set model.seq_length to at least 3\.$"),
    ("masked", ["model.seq_length=3"], "at least 4"),
    ("whole words, order", ["model.seq_length=4"], "at least 5"),
    ("prefix", ["model.seq_length=1"], "at least 2"),
    ("whole words, order", ["model.num_tokentypes=0"], r"but model.num_tokentypes is 0; set model.num_tokentypes=2"),
    ("whole words, order", ["task.reset_position_ids=true"], "sentence_order compares two halves .* switch one of them off"),
    ("masked", ["task.prefix_lm=true"],
     r"task.prefix_lm is an option of causal_language_modeling, not of task.name masked_language_modeling; leave it away\.$"),
    ("masked", ["task.corruption=infilling"], "task.corruption is an option of denoising, not of task.name masked_language_modeling"),
    ("span corruption", ["task.reset_attention_mask=true"], "an option of causal_language_modeling and masked_language_modeling, not of task.name denoising"),
    ("causal", ["task.masking_do_full_word=true"], "masking_do_full_word is an option of .*, not of task.name causal_language_modeling"),
    ("causal", ["task.masking_probability=0.3"], "masking_probability is an option of .*, not of task.name causal_language_modeling"),
    ("causal", ["task.noise_density=0.3"], "noise_density is an option of .*, not of task.name causal_language_modeling"),
    ("causal", ["model.num_tokentypes=2"], "num_tokentypes does not go with task.name causal_language_modeling"),
    ("masked", ["task.masking_probability=1"], "task.masking_probability: input should be less than 1"),
    ("span corruption", ["task.corruption=bart"], "task.corruption: .*span_corruption"),
    ("causal", ["task.corruption=bart"], "corruption is an option of denoising, not of"),
    ("masked", ["task.masking_probabilty=0.2"], r"Unknown key task.masking_probabilty; did you mean task.masking_probability\?"),
]


@pytest.mark.parametrize("name, overrides, words", REFUSED, ids=lambda value: value[0][:40] if isinstance(value, list) else "")
def test_what_does_not_fit_is_one_sentence(small_data, tmp_path, name, overrides, words):
    save_config(objective_config(small_data, name), tmp_path / "run.yaml")
    task_of(load_config(tmp_path / "run.yaml")).check()
    with pytest.raises(UserError, match=words) as refusal:
        task_of(load_config(tmp_path / "run.yaml", overrides)).check()
    assert "\n" not in str(refusal.value)


def test_the_named_lengths_suffice(small_data, tmp_path):
    """The way out that a sentence names is one: shortest sequences and shortest targets give samples."""
    shortest = [("span corruption", 3), ("infilling", 3), ("masked", 4), ("whole words, order", 5), ("prefix", 2), ("causal", 1)]
    for name, length in shortest:
        save_config(objective_config(small_data, name), tmp_path / "run.yaml")
        train = open_train(load_config(tmp_path / "run.yaml", [f"model.seq_length={length}"]))
        assert all(train[index]["loss_mask"].sum() >= 1 for index in range(200)), name
    train = open_train(load_config(tmp_path / "run.yaml", ["model.family=encoder_decoder", "model.decoder_seq_length=8"]))
    assert train[0]["loss_mask"].all() and len(train[0]["labels"]) == 8
