"""Generation and evaluation of encoder-decoders and encoders: the cache changes nothing, beams find what they should, and the
numbers of `megadsl evaluate` are what their definitions say."""

import itertools
import math

import numpy as np
import pytest
import torch

from megadsl.data.tokenizer import Tokenizer
from megadsl.errors import UserError
from megadsl.inference.batches import objective_batches
from megadsl.inference.denoising import count_exact_spans, evaluate_denoising
from megadsl.inference.load import TrainedModel
from megadsl.inference.masked import evaluate_masked
from megadsl.inference.sampling import Sampling
from megadsl.inference.seq2seq import Decoding, beam_search, decode_marked, encode_marked, generate_target

ENCODER_DECODER = {"family": "encoder_decoder", "num_layers": 2, "decoder_seq_length": 12}


@pytest.fixture
def build(small_data, make_stack, tmp_path):
    def make(model: dict, data: dict | None = None) -> TrainedModel:
        config = small_data.config(tmp_path, model=model, data=data or {})
        stack, _ = make_stack(config)
        return TrainedModel(config, stack.definition, stack.eval(), Tokenizer.load(small_data.tokenizer), torch.device("cpu"))

    return make


@pytest.mark.parametrize("model, data", [
    ({"position_embedding_type": "relative"}, {}), ({"position_embedding_type": "rope", "num_query_groups": 2}, {}),
    ({"decoder_seq_length": 32}, {"denoising": "infilling"}),
])
@torch.inference_mode()
def test_decoding_step_by_step_gives_the_logits_of_a_full_pass(build, model, data):
    trained = build(ENCODER_DECODER | model, data)
    for name, parameter in trained.stack.canonical_parameters():
        if "relative_attention_bias" in name:
            parameter.normal_(generator=torch.Generator().manual_seed(2))
    generator = torch.Generator().manual_seed(0)
    source, target = torch.randint(5, 512, (1, 20), generator=generator), torch.randint(5, 512, (3, 9), generator=generator)
    decoding = Decoding(trained, source[0].tolist(), 3)
    steps = torch.stack([decoding.next_logits(target[:, index:index + 1]) for index in range(9)])
    inputs = (source.expand(3, -1), target, *([torch.ones(3, 20, dtype=torch.long)] if data else []))
    torch.testing.assert_close(steps, trained.stack(inputs), rtol=1e-4, atol=1e-5)


def test_beam_search_finds_the_best_of_all_targets(build):
    """With as many beams as there are prefixes, beam search is exhaustive: 5 tokens, at most 3 steps."""
    trained, vocabulary, end, steps = build(ENCODER_DECODER), 5, 4, 3
    source = [7, 8, 9, 3]
    with torch.inference_mode():
        found = beam_search(Decoding(trained, source, 64), 2, end, vocabulary, steps, 64)
        scores = {}
        for length in range(steps + 1):
            for row in itertools.product(range(4), repeat=length):
                targets = [*row, end] if length < steps else list(row)
                logits = trained.stack((torch.tensor([source]), torch.tensor([[2, *targets[:-1]]])))[:, 0, :vocabulary]
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
    assert count_exact_spans(right, span) == (3, 5)
    assert count_exact_spans(torch.ones_like(right), span) == (5, 5)


def stream(trained: TrainedModel, count: int = 600) -> np.ndarray:
    return np.random.RandomState(0).choice(np.flatnonzero(trained.tokenizer.is_text), count)


def test_evaluation_of_an_encoder(build):
    trained = build({"family": "encoder", "num_tokentypes": 2}, {"sentence_order": True})
    tokens = stream(trained)
    result = evaluate_masked(trained, tokens, 4, pseudo_tokens=40)
    # What the numbers have to be: tests/dist/test_evaluation.py.
    assert result.pseudo_perplexity_tokens == 40 and "pseudo-perplexity" in result.text() and "sentence-order" in result.text()
    # Pseudo-perplexity of the first token by hand: it alone is masked.
    batch = next(objective_batches(trained, tokens, 1, 0))
    masked = batch["labels"].clone()
    masked[0, 1] = trained.tokenizer.mask
    with torch.inference_mode():
        logits = trained.stack(trained.definition.split({**batch, "tokens": masked})[0])[0]
    by_hand = -logits[1, 0].log_softmax(-1)[batch["labels"][0, 1]]
    assert math.log(evaluate_masked(trained, tokens, 4, pseudo_tokens=1).pseudo_perplexity) == pytest.approx(float(by_hand), rel=1e-5)
    # Predicting what stands there is always right where nothing is masked away: a model cannot do it, this count can.
    assert evaluate_masked(trained, tokens, 4, pseudo_tokens=0) == evaluate_masked(trained, tokens, 3, pseudo_tokens=0)
    with pytest.raises(UserError, match="give more text"):
        evaluate_masked(trained, tokens[:5], 4)


@pytest.mark.parametrize("model, data", [({}, {}), ({"decoder_seq_length": 32}, {"denoising": "infilling"})])
def test_evaluation_of_an_encoder_decoder(build, model, data):
    trained = build(ENCODER_DECODER | model, data)
    tokens = stream(trained)
    result = evaluate_denoising(trained, tokens, 4)
    assert result.spans > 20
    assert result.loss == pytest.approx(evaluate_denoising(trained, tokens, 7).loss, rel=1e-6)
