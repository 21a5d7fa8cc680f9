"""Folding: the plain model with folded weights is the same function, to fp64 rounding, once every norm has its own epsilon."""

import pytest
import torch

from export_models import MODELS, make_config, make_subject
from megadsl.checkpoint.fold import fold, folding, unfold
from megadsl.model.stack import SequentialModel
from megadsl.tasks.planning import plan_for_comparison
from megadsl.tasks.registry import task_of

POST = {"norm_position": "post"}
DECODER = {**MODELS["GPT2LMHeadModel"], "layernorm_epsilon": 1e-5}
CASES = {
    "pre-12": ({**DECODER, "num_layers": 12}, "dslm"),
    "pre-1000": ({**DECODER, "num_layers": 1000, "hidden_size": 16, "seq_length": 8}, "dslm"),
    "post-12": ({**DECODER, **POST, "num_layers": 12}, "dslm"),
    "post-1000": ({**DECODER, **POST, "num_layers": 1000, "hidden_size": 16, "seq_length": 8}, "dslm"),
    "post-untied": ({**DECODER, **POST, "untie_embeddings_and_output_weights": True}, "dslm"),
    "encoder-decoder": (MODELS["MBartForConditionalGeneration"], "dslm"),
    "encoder": ({**MODELS["BertForMaskedLM"], "layernorm_epsilon": 1e-5}, "dslm"),
    "norm-factors": (DECODER, "layernorm_scaling"),
    "trained-gates": (DECODER, "layerscale"),
    "deepnorm": (MODELS["BartForConditionalGeneration"], "deepnorm"),
}


def plain_stack(config, weights, folded, vocab_size, with_epsilons):
    """The same model under `vanilla`, where every lambda and beta is 1, filled with plain weights."""
    definition = task_of(config).define_model(plan_for_comparison(config, "vanilla"), vocab_size)
    stack = SequentialModel(definition.entries).double().eval()
    with torch.no_grad():
        for name, parameter in stack.canonical_parameters():
            parameter.copy_(weights.pop(name))
    assert not weights
    epsilons = dict(folded.epsilon_factors) if with_epsilons else {}
    for index, layer in stack.layers.items():
        for name, module in layer.named_modules():
            full = f"{stack.entries[int(index)].name}.{name.removeprefix('layer').removeprefix('.')}".rstrip(".")
            if full in epsilons and hasattr(module, "eps"):
                module.eps *= epsilons.pop(full)
    assert not epsilons
    return stack


@pytest.mark.parametrize("case", CASES)
def test_folded_is_the_same_function(case, small_data, make_stack):
    model, scheme = CASES[case]
    config = make_config(small_data, model, scheme)
    source = make_subject(config, make_stack)
    source.network.double()
    sample = source.sample
    expected = source.logits(sample)
    folded = folding(source.plan, config.model)

    def error(with_epsilons: bool) -> float:
        stack = plain_stack(config, dict(fold(source.weights, folded)), folded, 640, with_epsilons)
        with torch.inference_mode():
            value = stack(source.definition.inputs_of(sample))["logits"]
        return ((value.transpose(0, 1)[..., :512] - expected).abs().max() / expected.abs().max()).item()

    assert error(with_epsilons=True) < 1e-12
    # One epsilon of 1e-5 for all norms costs up to eps (e^2 - 1) / 2 = 3e-5 where the stream has variance 1.
    assert error(with_epsilons=False) < 1e-4


@pytest.mark.parametrize("case", [case for case in CASES if "1000" not in case])
def test_unfold_inverts_fold(case, small_data, make_stack):
    model, scheme = CASES[case]
    config = make_config(small_data, model, scheme)
    source = make_subject(config, make_stack, perturbed=False)  # gates at their start, where unfold puts them
    folded = folding(source.plan, config.model)
    weights = source.weights
    again = dict(unfold(dict(fold(weights, folded)), folded))
    assert again.keys() == weights.keys()
    for name, tensor in weights.items():
        torch.testing.assert_close(again[name], tensor, rtol=3e-7, atol=0.0)
