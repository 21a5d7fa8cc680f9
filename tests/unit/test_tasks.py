"""Tasks by name: what a task does not take is refused by name, and what is written out reads back as the same task."""

import pytest
import yaml

from megadsl.config.load import load_saved_config, parse_config, save_config, upgraded
from megadsl.errors import UserError
from megadsl.tasks.registry import DEFAULTS, TASKS, resolved, task_class, task_of

# Section data of an earlier version, as its save_config wrote it.
FORMER_DATA = {
    "datasets": [{"path": "a", "weight": 1.0}], "num_workers": 2, "reset_position_ids": False, "reset_attention_mask": False,
    "eod_mask_loss": False, "prefix_lm": False, "masking_probability": 0.15, "masking_do_full_word": False, "sentence_order": False,
    "denoising": "span_corruption", "noise_density": 0.15, "mean_noise_span_length": 3.0,
}
CHANGED = {
    "decoder": {"prefix_lm": True, "eod_mask_loss": True, "reset_position_ids": True},
    "encoder": {"masking_probability": 0.3, "masking_do_full_word": True, "reset_attention_mask": True},
    "encoder_decoder": {"denoising": "infilling", "noise_density": 0.3, "mean_noise_span_length": 2.0},
}


def test_a_family_has_its_language_modelling():
    for family, name in DEFAULTS.items():
        task = task_of(parse_config({"model": {"family": family}}))
        assert task.name == name and type(task) is task_class(name) and family in task.families
    assert set(DEFAULTS.values()) <= set(TASKS)


@pytest.mark.parametrize("family, task, words", [
    ("encoder", {"prefix_lm": True},
     r"task.prefix_lm is an option of causal_language_modeling, not of task.name masked_language_modeling; leave it away\.$"),
    ("decoder", {"name": "causal_language_modeling", "corruption": "infilling"}, "task.corruption is an option of denoising, not of"),
    ("encoder_decoder", {"reset_position_ids": False},
     "task.reset_position_ids is an option of causal_language_modeling and masked_language_modeling, not of task.name denoising"),
    ("decoder", {"prefix_ml": True}, r"Unknown key task.prefix_ml; did you mean task.prefix_lm\?"),
    ("decoder", {"prefix_lm": "perhaps"}, "task.prefix_lm: .*'perhaps'"),
    ("decoder", {"name": "denoise"}, r"no task 'denoise' \(task.name\); did you mean denoising\?"),
    ("decoder", {"name": "denoising"}, "task.name denoising does not go with model.family decoder; it is a task of encoder_decoder"),
])
def test_what_a_task_does_not_take_is_one_sentence(family, task, words):
    with pytest.raises(UserError, match=words) as refusal:
        task_of(parse_config({"model": {"family": family}, "task": task}))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("family", DEFAULTS)
def test_a_resolved_configuration_names_its_task_and_reads_back_equal(family, tmp_path):
    changed = upgraded({"model": {"family": family}, "data": CHANGED[family]})["task"]
    config = resolved(parse_config({"model": {"family": family}, "task": changed}))
    assert config.task.name == DEFAULTS[family] and set(config.task.options) == set(task_class(config.task.name).Options.model_fields)
    assert config.task.options.items() >= changed.items()
    save_config(config, tmp_path / "config.yaml")
    assert load_saved_config(tmp_path / "config.yaml") == resolved(config) == config


@pytest.mark.parametrize("family", DEFAULTS)
def test_a_configuration_that_an_earlier_version_saved_still_loads(family, tmp_path):
    former = {"model": {"family": family}, "data": FORMER_DATA | CHANGED[family]}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(former), encoding="utf-8")
    config = load_saved_config(tmp_path / "config.yaml")
    assert (config.data.num_workers, config.data.datasets[0].path) == (2, "a")
    options = task_of(config).options.model_dump()
    assert options == {"z_loss": 0.0} | {{"denoising": "corruption"}.get(key, key): value for key, value in (FORMER_DATA | CHANGED[family]).items()
                                         if {"denoising": "corruption"}.get(key, key) in options}
    assert options.items() >= {{"denoising": "corruption"}.get(key, key): value for key, value in CHANGED[family].items()}.items()


def test_upgrading_changes_nothing_that_is_current():
    values = {"model": {"family": "encoder"}, "data": {"num_workers": 0}, "task": {"masking_probability": 0.2}}
    assert upgraded(values) is values and upgraded({}) == {}
