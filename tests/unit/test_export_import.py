"""Import from transformers: the round trip gives the same logits, and nothing that could hold code is read."""

import pickle
from dataclasses import replace

import pytest

from export_models import MODELS, make_config, make_subject
from megadsl.checkpoint.huggingface.export import export_huggingface
from megadsl.checkpoint.huggingface.importing import import_huggingface
from megadsl.checkpoint.huggingface.verify import relative_error
from megadsl.checkpoint.store import open_checkpoint
from megadsl.checkpoint.export_source import ExportSource
from megadsl.checkpoint.weights import read_weights
from megadsl.data.tokenizer import Tokenizer
from megadsl.errors import UserError
from megadsl.model.stack import SequentialModel
from megadsl.tasks.registry import task_of


def reopened(path) -> ExportSource:
    """The imported checkpoint as a model."""
    checkpoint = open_checkpoint(path)
    config, plan, tensors = checkpoint.config(), checkpoint.plan(), dict(read_weights(path))
    definition = task_of(config).define_model(plan, checkpoint.info.padded_vocab_size)
    stack = SequentialModel(definition.entries).eval()
    for name, parameter in stack.canonical_parameters():
        parameter.data.copy_(tensors.pop(name))
    assert not tensors
    return ExportSource(config, plan, stack, definition, {}, Tokenizer.load(checkpoint.tokenizer), checkpoint.tokenizer,
                        checkpoint.info.padded_vocab_size)


@pytest.mark.parametrize("architecture", MODELS)
@pytest.mark.parametrize("scheme", ["vanilla", "dslm"])
def test_round_trip(architecture, scheme, small_data, make_stack, tmp_path):
    source = make_subject(make_config(small_data, MODELS[architecture]), make_stack)
    export_huggingface(source, tmp_path / "hf")
    again = reopened(import_huggingface(tmp_path / "hf", tmp_path / "checkpoint", scheme))
    assert again.plan.scheme == scheme and again.config.model.family == source.config.model.family
    sample = source.sample
    if architecture == "T5ForConditionalGeneration":
        again = replace(again, definition=source.definition)
    assert relative_error(again.logits(sample), source.logits(sample)) < 1e-4


def test_layerscale_gets_its_gates(small_data, make_stack, tmp_path):
    source = make_subject(make_config(small_data, MODELS["GPT2LMHeadModel"]), make_stack)
    export_huggingface(source, tmp_path / "hf")
    again = reopened(import_huggingface(tmp_path / "hf", tmp_path / "checkpoint", "layerscale"))
    assert relative_error(again.logits(source.sample), source.logits(source.sample)) < 1e-4


class Malicious:
    """Unpickling it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_pickles_are_refused_unread(small_data, make_stack, tmp_path):
    source = make_subject(make_config(small_data, MODELS["GPT2LMHeadModel"]), make_stack)
    export_huggingface(source, tmp_path / "hf")
    (tmp_path / "hf" / "model.safetensors").unlink()
    (tmp_path / "hf" / "pytorch_model.bin").write_bytes(pickle.dumps(Malicious(tmp_path / "ran")))
    with pytest.raises(UserError, match="can hold code"):
        import_huggingface(tmp_path / "hf", tmp_path / "checkpoint")
    assert not (tmp_path / "ran").exists() and not (tmp_path / "checkpoint").exists()
