"""Configuration: merging, round trip, and one sentence for every mistake, before any process group is made."""

import os
import subprocess
import sys

import pytest
import yaml

from megadsl.config import load_config, save_config
from megadsl.errors import UserError

BASE = {"model": {"num_layers": 8, "hidden_size": 64, "num_attention_heads": 4}, "scheme": "dslm"}


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(BASE))
    return path


def test_later_files_and_overrides_win(config_file, tmp_path):
    second = tmp_path / "second.yaml"
    second.write_text("model: {num_layers: 24}\noptimizer: {lr: 0.002}\n")
    config = load_config([config_file, second], ["optimizer.lr=0.5", "scheme.k=1", "data.datasets=[a,{path: b, weight: 3}]"])
    assert (config.model.num_layers, config.model.hidden_size, config.optimizer.lr) == (24, 64, 0.5)
    assert (config.scheme.name, config.scheme.k) == ("dslm", 1.0)
    assert [(dataset.path, dataset.weight) for dataset in config.data.datasets] == [("a", 1.0), ("b", 3.0)]


def test_scheme_name_override_keeps_its_options(config_file):
    config = load_config(config_file, ["scheme.k=1", "scheme=vanilla"])
    assert (config.scheme.name, config.scheme.k) == ("vanilla", 1.0)


def test_saved_config_reads_back_equal(config_file, tmp_path):
    config = load_config(config_file, ["model.activation=swiglu", "training.seed=7"])
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml") == config


MISTAKES = {
    "unknown key, with the nearest": (["model.num_layer=3"], ["model.num_layer", "model.num_layers"]),
    "unknown section": (["optimiser.lr=1"], ["optimiser", "optimizer"]),
    "type error": (["model.hidden_size=wide"], ["model.hidden_size", "integer", "'wide'"]),
    "out of range": (["model.hidden_dropout=1.5"], ["model.hidden_dropout", "1.5"]),
    "not one of the choices": (["model.activation=gellu"], ["model.activation", "gelu"]),
    "heads and TP": (["parallel.tensor_model_parallel_size=8"], ["model.num_attention_heads", "parallel.tensor_model_parallel_size"]),
    "vocabulary and TP": (["parallel.tensor_model_parallel_size=4", "tokenizer.make_vocab_size_divisible_by=6"],
                          ["tokenizer.make_vocab_size_divisible_by", "parallel.tensor_model_parallel_size"]),
    "layers fewer than stages": (["parallel.pipeline_model_parallel_size=9"], ["parallel.pipeline_model_parallel_size 9", "8 layers"]),
    "ZeRO 2 with a pipeline": (["parallel.pipeline_model_parallel_size=2", "parallel.zero_stage=2"], ["zero_stage", "parallel.zero_stage=1"]),
    "ZeRO 0 with a pipeline": (["parallel.pipeline_model_parallel_size=2", "parallel.zero_stage=0"], ["zero_stage", "parallel.zero_stage=1"]),
    "16 bit with ZeRO 0": (["training.precision=bf16", "parallel.zero_stage=0"], ["parallel.zero_stage", "training.precision"]),
    "heads and hidden size": (["model.hidden_size=30"], ["hidden_size 30", "num_attention_heads"]),
    "query groups": (["model.num_query_groups=3"], ["num_query_groups 3"]),
    "learning rates": (["optimizer.min_lr=1"], ["optimizer", "min_lr"]),
    "moved to section task": (["data.prefix_lm=true"], ["Unknown key data.prefix_lm; it is task.prefix_lm now."]),
    "moved and renamed": (["data.denoising=infilling"], ["Unknown key data.denoising; it is task.corruption now."]),
    "no override": (["model.num_layers"], ["section.key=value"]),
}


@pytest.mark.parametrize("overrides, named", MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_sentence_that_names_the_key(config_file, overrides, named):
    with pytest.raises(UserError) as error:
        load_config(config_file, overrides)
    message = str(error.value)
    assert "\n" not in message
    for part in named:
        assert part in message


def test_broken_files_are_named(tmp_path):
    with pytest.raises(UserError, match="no configuration file .*nowhere.yaml"):
        load_config(tmp_path / "nowhere.yaml")
    broken = tmp_path / "broken.yaml"
    broken.write_text("model: [1,\n")
    with pytest.raises(UserError, match="broken.yaml is not readable YAML"):
        load_config(broken)
    broken.write_text("- a list\n")
    with pytest.raises(UserError, match="must hold sections"):
        load_config(broken)


@pytest.mark.parametrize("world_size, overrides, named", [
    (3, ["parallel.tensor_model_parallel_size=2"], "3 processes cannot be divided"),
    (2, ["training.global_batch_size=3", "training.micro_batch_size=1"], "training.global_batch_size 3 is not divisible"),
])
def test_world_size_must_fit(config_file, world_size, overrides, named):
    config = load_config(config_file, overrides)
    with pytest.raises(UserError, match=named):
        config.gradient_accumulation_steps(world_size)


def run_train(*arguments, world_size: int = 2) -> subprocess.CompletedProcess:
    # Rank 0 of 2 with no peer: it would hang if it made a process group before the mistake is found.
    environment = {**os.environ, "RANK": "0", "WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    return subprocess.run(
        [sys.executable, "-m", "megadsl", "train", *arguments], env=environment, capture_output=True, text=True, timeout=90
    )


def test_command_line_exits_with_2_before_any_process_group(small_data, tmp_path, config_file):
    good = small_data.config(tmp_path / "run", training={"global_batch_size": 8})
    save_config(good, tmp_path / "good.yaml")
    foreign = tmp_path / "foreign.model"
    _train_foreign_tokenizer(small_data, foreign)
    cases = {
        ("model.num_layer=3",): "did you mean model.num_layers",
        ("training.global_batch_size=6",): "training.global_batch_size 6 is not divisible",
        ("data.datasets=[nowhere]",): "nowhere",
        ("tokenizer.model=nowhere.model",): "nowhere.model",
        (f"tokenizer.model={foreign}",): "another tokenizer",
        ("model.num_tokentypes=2",): "model.num_tokentypes",
        ("scheme=dslmm",): "did you mean dslm",
        ("task.masking_probability=0.2",): "task.masking_probability is an option of masked_language_modeling",
        ("data.prefix_lm=true",): "it is task.prefix_lm now",
        (f"training.run_dir={small_data.tokenizer}",): "training.run_dir",
        ("training.device=cuda",): "no GPU",
    }
    for overrides, named in cases.items():
        result = run_train(str(tmp_path / "good.yaml"), *overrides)
        assert result.returncode == 2, (overrides, result.stderr)
        assert named in result.stderr
        assert result.stderr.startswith("megadsl: ") and len(result.stderr.strip().splitlines()) == 1, result.stderr
        assert not (tmp_path / "run").exists() or "device" in overrides[0], "devices are asked last, when torch is loaded"


def _train_foreign_tokenizer(small_data, path):
    from megadsl.data.tokenizer_training import train_tokenizer

    train_tokenizer(small_data.folder / "corpus", path, vocab_size=400)
