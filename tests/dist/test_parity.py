"""The same loss curve and gradient norm for every layout (TP, PP, DP, ZeRO) and family, through the whole of `megadsl train`.

20 steps of 6 layers, fp32, dropout 0, real text.
"""

import json
from pathlib import Path

import pytest
from ranks import ForkServer

from megadsl.config import Config

# (tensor, pipeline, data, ZeRO)
REFERENCE = (1, 1, 1, 0)
ALL = [
    (2, 1, 1, 1), (1, 2, 1, 1), (1, 1, 2, 0), (1, 1, 2, 1), (1, 1, 2, 2), (1, 1, 2, 3), (2, 2, 1, 1), (2, 1, 2, 2), (1, 2, 2, 1),
]
SOME = [(2, 1, 1, 1), (1, 2, 1, 1), (2, 2, 1, 1), (2, 1, 2, 3)]
ENCODER_DECODER = {"family": "encoder_decoder", "num_layers": 3, "num_decoder_layers": 3}
# name: (layouts, model section, task section)
RUNS = {
    "decoder": (ALL, {}, {}),
    "decoder untied relu": ([(2, 2, 1, 1)], {"untie_embeddings_and_output_weights": True, "activation": "relu"}, {}),
    "decoder packed": ([(2, 2, 1, 1)], {"position_embedding_type": "rope", "norm_position": "post", "num_query_groups": 2},
                       {"reset_attention_mask": True, "prefix_lm": True}),
    "decoder capped, z-loss": ([(2, 1, 1, 1), (1, 2, 1, 1), (1, 1, 2, 3)], {"attention_logit_softcap": 1.0, "num_query_groups": 2},
                               {"z_loss": 0.01}),
    "encoder": (SOME, {"family": "encoder", "num_tokentypes": 2}, {"sentence_order": True, "masking_do_full_word": True}),
    "encoder post": (SOME, {"family": "encoder", "norm_position": "post", "embedding_layernorm": True},
                     {"reset_attention_mask": True, "reset_position_ids": True}),
    "T5": (SOME, {**ENCODER_DECODER, "position_embedding_type": "relative", "normalization": "RMSNorm", "add_bias_linear": False,
                  "decoder_seq_length": 9}, {}),
    "BART": (SOME, {**ENCODER_DECODER, "norm_position": "post", "embedding_layernorm": True}, {"corruption": "infilling"}),
}
TOLERANCE = 1e-5


def _train(config: Config) -> None:
    from megadsl.training.loop import train

    train(config)


def _metrics(run_dir: str) -> tuple[list[float], list[float], float]:
    """(losses, gradient norms, validation loss) of a run."""
    rows = [json.loads(line) for line in (Path(run_dir) / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "train/loss" in row]
    validation = [row["validation/loss"] for row in rows if "validation/loss" in row]
    return [row["train/loss"] for row in steps], [row["train/grad_norm"] for row in steps], validation[-1]


@pytest.fixture(scope="module")
def curves(small_data, tmp_path_factory):
    """Metrics by (run, layout)."""
    folder, found = tmp_path_factory.mktemp("parity"), {}
    with ForkServer() as server:
        for name, (layouts, model, task) in RUNS.items():
            for layout in (REFERENCE, *layouts):
                tensor, pipeline, replicas, zero = layout
                config = small_data.config(
                    folder / name / "-".join(map(str, layout)), model=model, task=task,
                    # Adam divides by what may be rounding; where gradients are large it carries that from step to step.
                    optimizer={"lr": 1e-3 if name == "encoder post" else 3e-3},
                    parallel={"tensor_model_parallel_size": tensor, "pipeline_model_parallel_size": pipeline, "zero_stage": zero},
                )
                server.run(tensor * pipeline * replicas, _train, config)
                found[name, layout] = _metrics(config.training.run_dir)
    return found


@pytest.mark.parametrize("name", RUNS)
def test_every_layout_gives_the_same_curve(curves, name):
    losses, norms, validation = curves[name, REFERENCE]
    # Five batches each, because their losses scatter by .3.
    assert len(losses) == 20 and sum(losses[-5:]) < sum(losses[:5]) - 5 * 0.15, "the reference must learn, or parity means nothing"
    assert max(norms) > 0.5, "clipping must bind (clip_grad 0.5), or a wrong norm would not be seen"
    for layout in RUNS[name][0]:
        other_losses, other_norms, other_validation = curves[name, layout]
        assert other_losses == pytest.approx(losses, rel=TOLERANCE), layout
        assert other_norms == pytest.approx(norms, rel=TOLERANCE), layout
        assert other_validation == pytest.approx(validation, rel=TOLERANCE), layout
