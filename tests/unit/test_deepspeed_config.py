"""The DeepSpeed dict: derived where it follows from our config, read where it does not, refused where both say it."""

import json

import pytest

from megadsl.config import resources
from megadsl.config.deepspeed import deepspeed_config
from megadsl.config.load import parse_config
from megadsl.config.resources import shared_folder
from megadsl.errors import UserError


def config(**parallel):
    return parse_config({"parallel": parallel, "training": {"micro_batch_size": 2, "global_batch_size": 16},
                         "optimizer": {"clip_grad": 0.7}, "model": {"num_layers": 4}})


def test_batch_keys_follow_from_the_layout():
    assert deepspeed_config(config(), 1)["gradient_accumulation_steps"] == 8
    assert deepspeed_config(config(tensor_model_parallel_size=2), 4)["gradient_accumulation_steps"] == 4
    assert deepspeed_config(config(), 8)["train_micro_batch_size_per_gpu"] == 2


def test_clipping_is_ours_at_zero_0():
    assert deepspeed_config(config(zero_stage=0), 1)["gradient_clipping"] == 0.0
    assert deepspeed_config(config(zero_stage=1), 1)["gradient_clipping"] == 0.7


@pytest.mark.parametrize("path", sorted(shared_folder("ds_configs").glob("*.json")), ids=lambda path: path.name)
def test_shipped_files_set_nothing_that_is_derived(path):
    stage = next((int(digit) for digit in path.name if digit.isdigit()), 1)
    merged = deepspeed_config(config(zero_stage=stage, deepspeed_config=str(path)), 1)
    assert merged["zero_optimization"]["stage"] == stage


def test_auto_takes_the_file_of_the_layout():
    assert "stage3_prefetch_bucket_size" in deepspeed_config(config(zero_stage=3), 1)["zero_optimization"]
    assert "stage3_prefetch_bucket_size" not in deepspeed_config(config(zero_stage=3, deepspeed_config="none"), 1)["zero_optimization"]


@pytest.mark.parametrize("given, named", [
    ({"zero_optimization": {"stage": 1}}, "zero_optimization.stage"),
    ({"gradient_clipping": 3}, "gradient_clipping"),
])
def test_a_key_set_in_both_is_refused(tmp_path, given, named):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(given))
    with pytest.raises(UserError, match=f"sets {named}"):
        deepspeed_config(config(deepspeed_config=str(path)), 1)


def test_a_file_that_comes_along_is_known_by_its_name():
    offloaded = deepspeed_config(config(zero_stage=3, deepspeed_config="zero3_offload"), 1)
    assert offloaded["zero_optimization"]["offload_optimizer"]["device"] == "cpu"
    with pytest.raises(UserError, match=r"there is no .*ds_configs/zero3_ofload.json \(did you mean zero3_offload"):
        deepspeed_config(config(deepspeed_config="zero3_ofload"), 1)


def test_a_layout_without_its_file_is_an_error(tmp_path, monkeypatch):
    """A package whose share/ is incomplete; where nothing is missing, see tests/repo/test_installed.py."""
    (tmp_path / "share" / "ds_configs").mkdir(parents=True)
    monkeypatch.setattr(resources, "_PACKAGE", tmp_path)
    with pytest.raises(UserError, match=r"share/ds_configs/zero1.json; install megadsl again, .* parallel.deepspeed_config=none"):
        deepspeed_config(config(), 1)
    assert deepspeed_config(config(deepspeed_config="none"), 1)["zero_optimization"] == {"stage": 1}


def test_a_broken_file_is_named(tmp_path):
    with pytest.raises(UserError, match="nowhere.json"):
        deepspeed_config(config(deepspeed_config=str(tmp_path / "nowhere.json")), 1)
