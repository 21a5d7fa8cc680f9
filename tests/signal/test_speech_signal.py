"""Speech: the plan predicts what enters the trunk from measured frames, and the signal of encoder and decoder, Pre- and Post-LN."""

from statistics import median

import numpy as np
import pytest
from speech_data import write_speech

from megadsl.monitor.at_init import measure_at_init
from megadsl.tasks.planning import plan_for_run
from megadsl.tasks.speech.statistics import front_end_moments


@pytest.fixture(scope="module")
def utterances(tmp_path_factory):
    # As many as are measured, so that the statistics are those of what is measured.
    return write_speech(tmp_path_factory.mktemp("speech"), train=16, words=(6, 9))


@pytest.mark.parametrize("norm_position", ["pre", "post"])
def test_the_plan_predicts_long_sources_with_short_targets(small_data, utterances, tmp_path, one_process, norm_position):
    """Mean of eight draws: forward within 10 %, gradient within 20 % (Post-LN 25 %); Post-LN's embedding, whose gradient the first norm makes
    heavy-tailed where frames are nearly silent, is left out of the latter."""
    config = small_data.config(
        tmp_path, model={"family": "encoder_decoder", "num_layers": 8, "num_decoder_layers": 4, "hidden_size": 96, "seq_length": 40,
                         "decoder_seq_length": 60, "position_embedding_type": "sinusoidal", "norm_position": norm_position},
        task={"name": "speech_translation", "bucket_batches": 0, "time_mask_width": 10}, data={"datasets": [str(utterances)]},
        tokenizer={"model": str(utterances / "tokenizer.model")}, training={"global_batch_size": 16})
    plan = plan_for_run(config)
    assert {"inner_projection", "input_projection", "word_embedding"} < set(plan.embedding.weight_std)
    measured = measure_at_init(config, plan, 8)
    points = [plan.embedding, *plan.sublayers]
    for predicted, found in zip(points, measured, strict=True):
        assert found.forward_variance == pytest.approx(predicted.forward_variance, rel=0.1)
        assert found.correlation == pytest.approx(predicted.correlation, rel=0.1)
    ratios = [found.gradient_variance / predicted.gradient_variance for predicted, found in zip(points, measured, strict=True)][1:]
    assert ratios == pytest.approx([1.0] * len(ratios), rel=0.2 if norm_position == "pre" else 0.25), median(ratios)


def test_moments_of_the_front_end_are_those_of_random_convolutions():
    import torch
    import torch.nn.functional as F

    rng, channels, draws = np.random.RandomState(0), 64, 400
    frames = [np.cumsum(rng.standard_normal((length, 20)), axis=0) / 4 for length in (37, 50)]
    found = front_end_moments(frames, "convolution", channels)
    torch.manual_seed(0)
    squares = overlap = positions = pairs = 0.0
    for one in frames:
        x = torch.tensor(one.T[None], dtype=torch.float32)
        for _ in range(draws):
            inner = F.relu(F.conv1d(x, found.inner_std * torch.randn(channels, 20, 5), stride=2, padding=2))
            y = F.conv1d(inner, torch.randn(32, channels, 5) * found.size ** -0.5, stride=2, padding=2)[0] / 32 ** 0.5
            squares += float(y.square().sum())
            overlap += float(y.sum(dim=1).square().sum() - y.square().sum())
            positions, pairs = positions + y.size(1), pairs + y.size(1) * (y.size(1) - 1)
    assert squares / positions == pytest.approx(found.second_moment, rel=0.03)
    assert overlap / pairs / (squares / positions) == pytest.approx(found.overlap, rel=0.03)
    assert np.mean(found.spread) == pytest.approx(1.0, rel=0.02)
