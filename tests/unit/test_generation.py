"""Generation: the key/value cache changes nothing, sampling keeps its promises, and text stops where it should."""

import pytest
import torch

from megadsl.data.tokenizer import Tokenizer
from megadsl.errors import UserError
from megadsl.inference.generate import generate, next_token_logits
from megadsl.inference.load import TrainedModel
from megadsl.inference.sampling import Sampling


@pytest.fixture
def model(request, small_data, make_stack, tmp_path) -> TrainedModel:
    config = small_data.config(tmp_path, model={"num_query_groups": 2, **getattr(request, "param", {})})
    stack, _ = make_stack(config)
    return TrainedModel(config, stack.definition, stack.eval(), Tokenizer.load(small_data.tokenizer), torch.device("cpu"))


@pytest.mark.parametrize("model", [{}, {"attention_logit_softcap": 0.5}], indirect=True, ids=["plain", "capped"])
@torch.inference_mode()
def test_cache_gives_the_logits_of_a_full_forward_pass(model):
    from megadsl.model.cache import KeyValueCache

    tokens = torch.randint(0, 512, (3, 20), generator=torch.Generator().manual_seed(0))
    cache = KeyValueCache(3, 32)
    cached = [next_token_logits(model, tokens[:, :12], cache)]
    cached += [next_token_logits(model, tokens[:, index:index + 1], cache) for index in range(12, 20)]
    full = model({"tokens": tokens})["logits"][11:]  # [s, b, v]
    torch.testing.assert_close(torch.stack(cached), full, rtol=1e-4, atol=1e-5)


def choices(logits: list[float], draws: int = 4000, **options) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    chosen = Sampling(**options).choose(torch.tensor([logits] * draws), generator)
    return torch.bincount(chosen, minlength=len(logits)) / draws


def test_sampling_rules():
    logits = [2.0, 1.0, 0.0, -1.0]
    probability = torch.tensor(logits).softmax(0)
    error = 5 * (0.25 / 4000) ** 0.5  # five standard errors of a share
    torch.testing.assert_close(choices(logits), probability, rtol=0, atol=error)
    torch.testing.assert_close(choices(logits, temperature=0.5), (2 * torch.tensor(logits)).softmax(0), rtol=0, atol=error)
    assert choices(logits, temperature=0)[0] == 1
    assert choices(logits, top_k=1)[0] == 1
    assert choices(logits, top_k=2)[2:].sum() == 0 and choices(logits, top_k=2)[1] > 0.2
    # .64 alone is less than .7, so the second token stays too.
    kept = choices(logits, top_p=0.7)
    assert kept[2:].sum() == 0 and kept[1] > 0.2
    assert choices(logits, top_p=0.6)[0] == 1
    assert choices(logits, top_p=0.0001)[0] == 1


def test_generation_is_repeatable_and_bounded(model):
    first = generate(model, "import ", 10, Sampling(seed=3), num_samples=2)
    assert first == generate(model, "import ", 10, Sampling(seed=3), num_samples=2)
    assert first[0] != first[1]
    assert first != generate(model, "import ", 10, Sampling(seed=4), num_samples=2)
    left = model.config.model.seq_length - len(model.tokenizer.encode("import "))
    greedy = [generate(model, "import ", most, Sampling(temperature=0)) for most in (left - 1, left, 10_000)]
    assert greedy[0] != greedy[1] == greedy[2]
    assert generate(model, "", 5, Sampling())[0] is not None


def test_stops_at_end_of_document(model):
    with torch.no_grad():
        # A head that always answers end-of-document: its row is the final norm's constant output direction.
        norm = next(call for entry, call in model.network.calls() if entry.name == "final_norm").layer
        norm.weight.zero_()
        norm.bias.copy_(torch.ones_like(norm.bias))
        word = next(call for entry, call in model.network.calls() if entry.name == "embedding.word")
        word.weight[model.tokenizer.eod] = 10.0
    assert generate(model, "import ", 20, Sampling(temperature=0)) == [""]


@pytest.mark.parametrize("arguments, named", [
    ({"temperature": -1.0}, "--temperature"), ({"temperature": float("nan")}, "--temperature"), ({"seed": 2**70}, "--seed"), ({"top_k": -2}, "--top-k"), ({"top_p": 0.0}, "--top-p"), ({"top_p": 1.5}, "--top-p"),
])
def test_bad_numbers_are_named(arguments, named):
    with pytest.raises(UserError, match=named):
        Sampling(**arguments)


def test_prompt_that_is_too_long(model):
    with pytest.raises(UserError, match="model.seq_length"):
        generate(model, "import os\n" * 40, 5, Sampling())
    with pytest.raises(UserError, match="--max-new-tokens"):
        generate(model, "x", 0, Sampling())
