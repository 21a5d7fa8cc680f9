"""The speech task's model: padding changes nothing, smoothed labels are what their definition says, and an utterance decides the text."""

import pytest
import torch
import torch.nn.functional as F
from speech_data import write_speech

from megadsl.inference.beam_search import beam_search
from megadsl.inference.load import TrainedModel
from megadsl.inference.seq2seq import Decoding
from megadsl.model.loss import smoothed_token_losses


@pytest.fixture(scope="module")
def utterances(tmp_path_factory):
    return write_speech(tmp_path_factory.mktemp("speech"), train=16)


@pytest.fixture
def build(small_data, utterances, make_stack, tmp_path):
    def make(**task):
        config = small_data.config(
            tmp_path, model={"family": "encoder_decoder", "num_layers": 2, "seq_length": 30, "decoder_seq_length": 40},
            task={"name": "speech_translation", "conv_channels": 16, **task}, data={"datasets": [str(utterances)]},
            tokenizer={"model": str(utterances / "tokenizer.model")})
        stack, _ = make_stack(config, 384)
        with torch.no_grad():  # also where training has moved them
            for name, parameter in stack.canonical_parameters():
                if name.endswith("bias"):
                    parameter.normal_(0, 0.1, generator=torch.Generator().manual_seed(len(name)))
        return config, stack

    return make


@pytest.mark.parametrize("front_end", ["convolution", "stacking"])
@torch.inference_mode()
def test_padding_changes_nothing(build, front_end):
    _, stack = build(front_end=front_end)
    task = stack.task
    examples = task.splits(0).examples("test")
    samples = sorted((examples[index] for index in range(6)), key=task.source_length)
    together = task.collate(samples)
    logits = stack.eval()(stack.definition.inputs_of(together))["logits"]
    for row in (0, 5):
        alone = task.collate([samples[row]])
        length = alone["labels"].size(1)
        assert row or alone["frames"].size(1) < together["frames"].size(1)
        torch.testing.assert_close(stack(stack.definition.inputs_of(alone))["logits"][:, 0], logits[:length, row], rtol=1e-4, atol=1e-5)
    sums = [task.loss({"logits": logits.clone()}, together)[0], *task.metrics({"logits": logits}, together)]
    real = together["loss_mask"].bool()
    expected = F.cross_entropy(logits.transpose(0, 1)[real], together["labels"][real], reduction="sum")
    assert float(sums[1].total) == pytest.approx(float(expected), rel=1e-5) and float(sums[0]) > float(expected) * 0.9


def test_smoothed_labels(one_process):
    logits = torch.randn(5, 2, 12, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 10, (2, 5))
    found = smoothed_token_losses(logits, labels, 0.1, 10).sum()
    log_p = logits.log_softmax(-1).transpose(0, 1)
    expected = -(0.9 * log_p.gather(-1, labels[..., None]).sum() + 0.1 * log_p[..., :10].mean(-1).sum())
    assert float(found) == pytest.approx(float(expected), rel=1e-5)
    torch.testing.assert_close(torch.autograd.grad(found, logits)[0], torch.autograd.grad(expected, logits)[0], rtol=1e-4, atol=1e-6)


@torch.inference_mode()
def test_a_batch_of_sources_is_searched_as_each_alone(build):
    config, stack = build()
    task = stack.task
    trained = TrainedModel(config, stack.definition, stack.eval(), task.tokenizer, torch.device("cpu"))
    examples = task.splits(0).examples("test")
    samples = [examples[index] for index in range(5)]

    def searched(chosen):
        batch = task.collate(chosen)
        decoding = Decoding(trained, {name: batch[name] for name in ("frames", "frame_counts")}, 3)
        return beam_search(decoding, task.tokenizer.bos, task.tokenizer.eos, task.tokenizer.vocab_size, 12, 3, 0.6, early_stopping=True)

    together = searched(samples)
    assert len({tuple(found[0][1]) for found in together}) > 1, "the utterance must matter"
    for sample, found in zip(samples, together, strict=True):
        alone = searched([sample])[0]
        assert [row for _, row in alone] == [row for _, row in found]
        assert [score for score, _ in alone] == pytest.approx([score for score, _ in found], rel=1e-4)
