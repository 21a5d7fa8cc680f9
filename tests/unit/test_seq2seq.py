"""Generation and evaluation of encoder-decoders and encoders: the cache changes nothing, beams find what they should, and the
numbers of `megadsl evaluate` are what their definitions say."""

import itertools
import math

import numpy as np
import pytest
import torch

from megadsl.data.tokenizer import Tokenizer
from megadsl.errors import UserError
from megadsl.inference.load import TrainedModel
from megadsl.inference.sampling import Sampling
from megadsl.inference.beam_search import beam_search
from megadsl.inference.seq2seq import decode_marked, decoding_of_tokens, encode_marked, generate_target
from megadsl.tasks.language.denoising import exact_spans
from megadsl.tasks.language.samples import StreamSamples
from megadsl.tasks.language.texts import tokens_of_text
from megadsl.tasks.registry import task_of
from megadsl.tasks.task import EvaluationRequest

ENCODER_DECODER = {"family": "encoder_decoder", "num_layers": 2, "decoder_seq_length": 12}


@pytest.fixture
def build(small_data, make_stack, tmp_path):
    def make(model: dict, task: dict | None = None) -> TrainedModel:
        config = small_data.config(tmp_path, model=model, task=task or {})
        stack, _ = make_stack(config)
        return TrainedModel(config, stack.definition, stack.eval(), Tokenizer.load(small_data.tokenizer), torch.device("cpu"))

    return make


@pytest.mark.parametrize("model, task", [
    ({"position_embedding_type": "relative"}, {}), ({"position_embedding_type": "rope", "num_query_groups": 2}, {}),
    ({"decoder_seq_length": 32}, {"corruption": "infilling"}),
])
@torch.inference_mode()
def test_decoding_step_by_step_gives_the_logits_of_a_full_pass(build, model, task):
    trained = build(ENCODER_DECODER | model, task)
    for name, parameter in trained.network.canonical_parameters():
        if "relative_attention_bias" in name:
            parameter.normal_(generator=torch.Generator().manual_seed(2))
    generator = torch.Generator().manual_seed(0)
    source, target = torch.randint(5, 512, (1, 20), generator=generator), torch.randint(5, 512, (3, 9), generator=generator)
    decoding = decoding_of_tokens(trained, source[0].tolist(), 3)
    steps = torch.stack([decoding.next_logits(target[:, index:index + 1]) for index in range(9)])
    inputs = {"source_tokens": source.expand(3, -1), "target_tokens": target, "source_segments": torch.ones(3, 20, dtype=torch.long)}
    torch.testing.assert_close(steps, trained(inputs)["logits"], rtol=1e-4, atol=1e-5)


def test_beam_search_finds_the_best_of_all_targets(build):
    """With as many beams as there are prefixes, beam search is exhaustive: 5 tokens, at most 3 steps."""
    trained, vocabulary, end, steps = build(ENCODER_DECODER), 5, 4, 3
    source = [7, 8, 9, 3]
    with torch.inference_mode():
        found = [row for _, row in beam_search(decoding_of_tokens(trained, source, 64), 2, end, vocabulary, steps, 64)[0]]
        scores = {}
        for length in range(steps + 1):
            for row in itertools.product(range(4), repeat=length):
                targets = [*row, end] if length < steps else list(row)
                read = {"source_tokens": torch.tensor([source]), "target_tokens": torch.tensor([[2, *targets[:-1]]])}
                logits = trained(read)["logits"][:, 0, :vocabulary]
                chosen = logits.log_softmax(-1)[torch.arange(len(targets)), targets]
                scores[row] = float(chosen.mean())
    best = sorted(scores, key=scores.get, reverse=True)
    assert found[0] == list(best[0])
    assert [tuple(row) for row in found[:5]] == best[:5]


def test_generation_from_a_source(build):
    trained = build(ENCODER_DECODER)
    prompt = "def <extra_id_0>(self): <extra_id_1>"
    greedy = generate_target(trained, prompt, 10, Sampling(temperature=0))
    assert greedy == generate_target(trained, prompt, 10, Sampling(temperature=0), num_samples=2)[1:]
    assert generate_target(trained, prompt, 10, Sampling(seed=1)) != generate_target(trained, prompt, 10, Sampling(seed=2))
    assert generate_target(trained, "def x", 10, Sampling(temperature=0)) != greedy, "the source must matter"
    assert len(generate_target(trained, prompt, 5, Sampling(), num_samples=2, num_beams=3)) == 2
    assert generate_target(trained, prompt, 12, Sampling(temperature=0)) == generate_target(trained, prompt, 99, Sampling(temperature=0))
    for arguments, named in (((prompt, 10, Sampling(), 3, 2), "--num-beams"), (("import os\n" * 40, 5, Sampling()), "model.seq_length"),
                             (("<extra_id_77>", 5, Sampling()), "<extra_id_77>"), ((prompt, 0, Sampling()), "--max-new-tokens")):
        with pytest.raises(UserError, match=named):
            generate_target(trained, *arguments)


def test_marks_survive_a_round_trip(small_data):
    tokenizer = Tokenizer.load(small_data.tokenizer)
    text = "def <extra_id_0>(self):\n    <extra_id_11>x"
    ids = encode_marked(tokenizer, text)
    assert tokenizer.additional_special_tokens_ids[0] in ids and tokenizer.additional_special_tokens_ids[11] in ids
    assert decode_marked(tokenizer, ids) == text
    assert tokenizer.mask in encode_marked(tokenizer, "a <mask> b")


def test_exact_spans_are_counted():
    span = torch.tensor([[0, 1, 1, 0, 2, 2], [0, 0, 1, 2, 0, 3]])
    right = torch.tensor([[False, True, True, False, True, False], [True, True, False, True, False, True]])
    assert exact_spans(right, span) == (3, 5)
    assert exact_spans(torch.ones_like(right), span) == (5, 5)


@pytest.fixture
def text(small_data, tmp_path) -> str:
    """A file of random pieces, which no model can know anything of."""
    tokenizer = Tokenizer.load(small_data.tokenizer)
    ids = np.random.RandomState(0).choice(np.flatnonzero(tokenizer.is_text), 600)
    (tmp_path / "random.txt").write_text(tokenizer.decode(ids.tolist()), encoding="utf-8")
    return str(tmp_path / "random.txt")


def evaluated(trained: TrainedModel, data: str, samples: int, **request) -> dict:
    """What `megadsl evaluate` finds with forward passes of so many samples."""
    task = task_of(trained.config)
    return task.evaluate(trained, EvaluationRequest(data, batch_tokens=samples * task.positions_per_sample, **request))


def test_evaluation_of_an_encoder(build, text, tmp_path):
    trained = build({"family": "encoder", "num_tokentypes": 2}, {"sentence_order": True})
    task = task_of(trained.config)
    result = evaluated(trained, text, 4, pseudo_tokens=40)
    # What the numbers have to be: tests/dist/test_evaluation.py.
    shown = task.describe_results(result)
    assert result["pseudo_perplexity_tokens"] == 40 and "pseudo-perplexity" in shown and "sentence-order" in shown
    # Pseudo-perplexity of the first token by hand: it alone is masked.
    tokens, _ = tokens_of_text(text, trained.tokenizer)
    sample = StreamSamples(tokens[:task.window.length], task.objective(), task.window.length)[0]
    masked = sample["labels"].clone()
    first = int(np.flatnonzero(trained.tokenizer.is_text[masked.numpy()])[0])
    masked[first] = trained.tokenizer.mask
    with torch.inference_mode():
        logits = trained(task.collate([{**sample, "tokens": masked}]))["logits"]
    by_hand = -logits[first, 0].log_softmax(-1)[sample["labels"][first]]
    (tmp_path / "window.txt").write_text(trained.tokenizer.decode(tokens[:task.window.length].tolist()), encoding="utf-8")
    assert np.array_equal(tokens_of_text(str(tmp_path / "window.txt"), trained.tokenizer)[0][:-1], tokens[:task.window.length])
    alone = evaluated(trained, str(tmp_path / "window.txt"), 4, pseudo_tokens=1)["pseudo_perplexity"]
    assert math.log(alone) == pytest.approx(float(by_hand), rel=1e-5)
    # How many samples a forward pass takes makes no difference.
    four, three = (evaluated(trained, text, samples, pseudo_tokens=0) for samples in (4, 3))
    # A product with two columns is rounded otherwise for another number of rows.
    assert four.pop("sentence_order_loss") == pytest.approx(three.pop("sentence_order_loss"), rel=1e-6)
    assert four == three
    (tmp_path / "short.txt").write_text("x")
    with pytest.raises(UserError, match="give more text"):
        evaluated(trained, str(tmp_path / "short.txt"), 4)


@pytest.mark.parametrize("model, task", [({}, {}), ({"decoder_seq_length": 32}, {"corruption": "infilling"})])
def test_evaluation_of_an_encoder_decoder(build, text, model, task):
    trained = build(ENCODER_DECODER | model, task)
    result = evaluated(trained, text, 4)
    assert result["spans"] > 20
    assert result["loss"] == pytest.approx(evaluated(trained, text, 7)["loss"], rel=1e-6)
