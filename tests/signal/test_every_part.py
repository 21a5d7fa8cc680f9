"""The plan is right for every combination of parts: predicted against measured moments, 48 layers deep, on real text.

Combinations are random but fixed. Every draw of the weights gives its own moments, so the mean over draws is known to its
standard error, which the tolerance counts three times on top of what the theory itself may miss (THEORY.md, section 12).
"""

import math
import random

import numpy as np
import pytest

from megadsl.config.load import parse_config

DRAWS = 4
COMBINATIONS = 10
# What the theory may miss at width 64: forward second moment, and gradient variance as a factor. Gradients of an
# encoder-decoder's encoder hang on the gradient's correlation at the head, which the targets' own statistics would set.
FORWARD, GRADIENT = 0.10, {"decoder": 0.25, "encoder": 0.35, "encoder_decoder": 0.60}


def combination(number: int, small_data) -> dict:
    """Sections of a random model; families take turns, so that each is there."""
    draw = random.Random(number)
    family = ("decoder", "encoder", "encoder_decoder")[number % 3]
    model = {
        "family": family, "norm_position": draw.choice(["pre", "post"]), "num_layers": 24 if family == "encoder_decoder" else 48,
        "hidden_size": 64, "num_attention_heads": 4, "seq_length": 64, "num_query_groups": draw.choice([4, 2, 1]),
        "activation": draw.choice(["relu", "gelu", "tanh_gelu", "silu", "squared_relu", "swiglu", "geglu"]),
        "normalization": draw.choice(["LayerNorm", "RMSNorm"]),
        "position_embedding_type": draw.choice(["learned_absolute", "sinusoidal", "rope", "relative", "none"]),
        "qk_layernorm": draw.random() < 0.3, "add_bias_linear": draw.random() < 0.5, "embedding_layernorm": draw.random() < 0.3,
        "hidden_dropout": draw.choice([0.0, 0.1]), "attention_dropout": draw.choice([0.0, 0.1]),
        "untie_embeddings_and_output_weights": draw.random() < 0.5,
    }
    if family == "encoder_decoder":
        model["decoder_seq_length"] = 14  # what span corruption makes of 64 tokens
    return {
        "model": model, "tokenizer": {"model": str(small_data.tokenizer)}, "data": {"datasets": [str(small_data.dataset)]},
    }


def measured(sections: dict, plan) -> np.ndarray:
    """[draw, point, (forward variance, gradient variance)] after the embedding and after every sublayer."""
    from megadsl.monitor.at_init import measure_at_init

    draws = []
    for seed in range(DRAWS):
        points = measure_at_init(parse_config({**sections, "training": {"seed": seed}}), plan, 1)
        draws.append([(point.forward_variance, point.gradient_variance) for point in points])
    return np.array(draws)


def planned(plan) -> np.ndarray:
    return np.array([(point.forward_variance, point.gradient_variance) for point in (plan.embedding, *plan.sublayers)])


def misses(draws: np.ndarray, expected: np.ndarray, gradient_slack: float) -> tuple[float, float]:
    """How far the worst point of (forward, gradient) is off, in units of its tolerance: at most 1 is right."""
    logs = np.log(draws / expected)
    mean, error = logs.mean(axis=0), logs.std(axis=0, ddof=1) / math.sqrt(len(draws))
    slack = np.array([FORWARD, gradient_slack])
    forward, gradient = (np.abs(mean) / (slack + 3 * error)).max(axis=0)
    return float(forward), float(gradient)


@pytest.mark.parametrize("number", range(COMBINATIONS))
def test_plan_agrees_with_the_model(number, small_data, one_process):
    from megadsl.tasks.planning import plan_for_comparison, plan_for_run

    sections = combination(number, small_data)
    config = parse_config(sections)
    plan = plan_for_run(config)
    draws = measured(sections, plan)
    slack = GRADIENT[config.model.family]
    forward, gradient = misses(draws, planned(plan), slack)
    assert forward <= 1 and gradient <= 1, (forward, gradient, sections["model"])
    # The same check must tell a wrong plan: vanilla's prediction of the same model.
    other = planned(plan_for_comparison(config, "vanilla"))
    assert max(misses(draws, other, slack)) > 1.5
