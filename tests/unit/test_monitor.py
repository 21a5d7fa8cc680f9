"""Writers, progress lines, FLOPs and probes."""

import json

import pytest
import torch

from megadsl.config.load import parse_config
from megadsl.config.model import ModelConfig
from megadsl.model.flops import forward_flops
from megadsl.monitor.progress import LogRecord, Progress, duration
from megadsl.monitor.writer import MetricsWriter

SHAPE = {"num_layers": 3, "hidden_size": 32, "num_attention_heads": 4, "seq_length": 16}


def test_resumed_metrics_drop_what_will_be_written_again(tmp_path):
    writer = MetricsWriter(tmp_path, 1)
    for iteration in (1, 2, 3):
        writer.write(iteration, {"train/loss": float(iteration)})
    writer.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"iteration": 4, "tr')  # a line cut short by a kill
    writer = MetricsWriter(tmp_path, 3)
    writer.write(3, {"train/loss": 30.0})
    writer.close()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows == [{"iteration": 1, "train/loss": 1.0}, {"iteration": 2, "train/loss": 2.0}, {"iteration": 3, "train/loss": 30.0}]


def test_a_number_that_is_not_finite_is_written_as_null(tmp_path):
    writer = MetricsWriter(tmp_path, 1)
    writer.write(1, {"train/loss": float("nan"), "train/grad_norm": float("inf"), "train/lr": 0.5})
    writer.close()
    assert (tmp_path / "metrics.jsonl").read_text() == (
        '{"iteration": 1, "train/loss": null, "train/grad_norm": null, "train/lr": 0.5}\n'
    )


def test_log_line_says_everything(capsys):
    record = LogRecord(7, 100, 3.25, 1e-3, 0.5, 12345.6, 0.25, 1.5, 3 * 2**30, 3723.0 / 93, skipped=2)
    with Progress(100, 0, enabled=True) as progress:
        progress.log(record.text())
    line = capsys.readouterr().out
    for part in ("iteration   7/100", "loss 3.2500", "lr 1.000e-03", "grad norm 0.500", "12,346 tokens/s", "1.5 TFLOP/s",
                 "peak memory 3.00 GiB", "ETA 1:02:03", "padding 25.0%", "skipped 2"):
        assert part in line
    assert line.count("\n") == 1
    with Progress(100, 0, enabled=False) as progress:
        progress.log("nothing")
    assert capsys.readouterr().out == ""


def test_duration():
    assert [duration(seconds) for seconds in (0, 59.6, 3600, 90_000)] == ["0:00:00", "0:01:00", "1:00:00", "25:00:00"]


@pytest.mark.parametrize("parts", [{}, {"activation": "swiglu"}, {"num_query_groups": 2}, {"ffn_hidden_size": 80, "kv_channels": 16}])
def test_flops_agree_with_torchs_counter(small_data, make_stack, parts):
    from torch.utils.flop_counter import FlopCounterMode

    config = parse_config({"model": SHAPE | parts, "tokenizer": {"model": str(small_data.tokenizer)}})
    stack, _ = make_stack(config)
    # The CPU's fused attention kernel is not counted by torch; the plain one is.
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        stack({"tokens": torch.zeros(2, 16, dtype=torch.long)})
    model: ModelConfig = config.model
    # torch counts the whole score matrix of a causal attention, we the half that is used.
    unused_half = 2.0 * model.num_layers * 2 * model.num_attention_heads * model.head_dim * model.seq_length / 2
    assert counter.get_total_flops() / 2 == pytest.approx(forward_flops(model, stack.task.head_multiplications()) + 16 * unused_half, rel=1e-9)


@pytest.mark.parametrize("family", ["encoder", "encoder_decoder"])
def test_flops_of_the_other_families(small_data, make_stack, family):
    from torch.utils.flop_counter import FlopCounterMode

    model = SHAPE | {"family": family, "decoder_seq_length": 8}
    config = parse_config({"model": model, "tokenizer": {"model": str(small_data.tokenizer)}})
    stack, _ = make_stack(config)
    model, tokens = config.model, torch.zeros(2, 16, dtype=torch.long)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        stack({"tokens": tokens} if family == "encoder" else {"source_tokens": tokens, "target_tokens": tokens[:, :8]})
    # Only the decoder's self-attention is causal: half of its 8 x 8 scores are not used.
    unused = 0.0 if family == "encoder" else 2.0 * model.decoder_layers * 2 * model.hidden_size * 8 * 8 / 2
    assert counter.get_total_flops() / 2 == pytest.approx(forward_flops(model, stack.task.head_multiplications()) + unused, rel=1e-9)
