"""What shows the measured signal: signal.jsonl and its npz, scalars, heat maps in few columns, pictures, event files, W&B offline."""

import math
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megadsl.config.load import parse_config
from megadsl.config.training import MonitorConfig
from megadsl.errors import UserError
from megadsl.monitor import signal_log
from megadsl.monitor.depth_timeline import DepthTimeline, pooled_rows
from megadsl.monitor.device_peak import peak_tflops
from megadsl.monitor.display import EventFiles
from megadsl.monitor.drawing import Drawing
from megadsl.monitor.names import LAYOUT, SHOWN, shown
from megadsl.monitor.pictures import PictureMaker
from megadsl.monitor.signal import PREDICTED, QUANTITIES, SignalHistory, SignalRecord, points_of, predicted
from megadsl.monitor.signal_log import SignalLog
from megadsl.monitor.signal_scalars import signal_scalars
from megadsl.monitor.wandb_run import check_wandb
from megadsl.monitor.writer import MetricsWriter
from megadsl.tasks.planning import plan_for_run

SHAPE = {"num_layers": 6, "hidden_size": 32, "num_attention_heads": 4, "seq_length": 32}


@pytest.fixture(scope="module")
def plan():
    return plan_for_run(parse_config({"model": SHAPE}))


def record_of(plan, iteration: int, scale: float = 1.0) -> SignalRecord:
    """As planned, times `scale`; what has no plan is 1 where the point has it."""
    points = points_of(plan)
    values = {name: scale * predicted(plan, name) for name in PREDICTED}
    for quantity, kind in (("attention_logit_max", "self_attention"), ("attention_entropy", "self_attention"), ("dead_activations", "ffn"),
                           ("angular_distance", "ffn")):
        values[quantity] = np.array([scale if point.kind == kind else math.nan for point in points])
    return SignalRecord(iteration, values, {"update_ratio": {"decoder.0.fc1": 1e-3 * scale, "decoder.5.fc2": 2e-3 * scale}})


def test_a_resumed_run_continues_its_signal(plan, tmp_path):
    first = SignalLog(tmp_path, points_of(plan), first_iteration=1)
    for iteration in (0, 10, 20):
        first.append(record_of(plan, iteration, 1.0 + iteration))
    first.close()
    with open(tmp_path / "signal.jsonl", "a") as file:
        file.write('{"iteration": 30, "val')  # a line cut short by a kill
    resumed = SignalLog(tmp_path, points_of(plan), first_iteration=21)  # 20 steps are done; the 21st is measured anew, as record 20
    assert resumed.history.iterations == [0, 10]
    resumed.append(record_of(plan, 20, 7.0))
    resumed.save_npz()
    resumed.close()
    history = SignalHistory.read(tmp_path / "signal.jsonl")
    assert history.iterations == [0, 10, 20] and history.points == points_of(plan)
    assert history.records[-1].values["forward_second_moment"] == pytest.approx(7.0 * predicted(plan, "forward_second_moment"))
    arrays = np.load(tmp_path / "signal.npz")
    assert arrays["forward_second_moment"].shape == (3, len(points_of(plan))) and list(arrays["iterations"]) == [0, 10, 20]
    assert arrays["parameter_update_ratio"][-1] == pytest.approx([7e-3, 14e-3])
    other = plan_for_run(parse_config({"model": SHAPE | {"num_layers": 3}}))
    with pytest.raises(UserError, match="another model"):
        SignalLog(tmp_path, points_of(other), first_iteration=21)
    SignalLog(tmp_path, points_of(other), first_iteration=1).close()
    assert SignalHistory.read(tmp_path / "signal.jsonl").records == []


def test_memory_does_not_grow_with_the_run(plan, tmp_path, monkeypatch):
    monkeypatch.setattr(signal_log, "NUMBERS", 0)  # so that 64 records are the most
    log = SignalLog(tmp_path, points_of(plan), first_iteration=1)
    for iteration in range(1000):
        log.append(record_of(plan, iteration))
        kept = log.history.iterations
        assert kept[0] == 0 and kept[-1] == iteration and len(kept) <= 65
    log.close()
    assert len(SignalHistory.read(tmp_path / "signal.jsonl").records) == 1000
    resumed = SignalLog(tmp_path, points_of(plan), first_iteration=1001)
    assert resumed.history.iterations == kept
    resumed.append(record_of(plan, 1000))
    assert resumed.history.iterations[-1] == 1000
    resumed.close()


def test_scalars_say_where(plan):
    record = record_of(plan, 5)
    record.values["forward_second_moment"][3] *= 2.0
    record.values["gradient_variance"][4] *= 0.25
    record.values["attention_logit_max"][5] = 9.0
    record.values["token_correlation"][2] -= 0.125
    found = {scalar.name: (scalar.value, scalar.where) for scalar in signal_scalars(plan, record)}
    names = [point.name for point in points_of(plan)]
    assert found["signal/forward_ratio_max"] == (pytest.approx(2.0), names[3])
    assert found["signal/forward_ratio_median"] == (pytest.approx(1.0), "")
    assert found["signal/gradient_ratio_min"] == (pytest.approx(0.25), names[4])
    assert found["signal/attention_logit_max"] == (9.0, names[5])
    assert found["signal/token_correlation_difference_max"] == (pytest.approx(-0.125), names[2])
    assert found["weights/update_ratio_max"] == (2e-3, "decoder.5.fc2")
    only_nan = replace(record, values={name: np.full(len(names), math.nan) for name in QUANTITIES}, parameters={})
    assert signal_scalars(plan, only_nan) == []


def test_a_heat_map_keeps_the_spike():
    """256 columns for 100000 records, 40 rows for 1000 points: one extreme number stays, whichever sign it has."""
    timeline = DepthTimeline(1000)
    for iteration in range(0, 10_000, 10):
        row = np.full(1000, 0.1)
        if iteration == 5430:
            row[613] = -2.5
        timeline.add(iteration, row)
    values, edges = timeline.values, timeline.edges
    assert values.shape[1] <= 256 and len(edges) == values.shape[1] + 1 and (np.diff(edges) > 0).all()
    pooled = pooled_rows(values, 40)
    assert len(pooled) == 40
    (depth,), (column,) = np.where(pooled == -2.5)
    assert depth == 613 // 25 and edges[column] <= 5430 < edges[column + 1]
    assert (np.delete(pooled.ravel(), depth * pooled.shape[1] + column) == np.float32(0.1)).all()


@pytest.mark.parametrize("family", ["decoder", "encoder_decoder"])
def test_every_measured_quantity_has_a_picture(family, plan):
    if family != "decoder":
        plan = plan_for_run(parse_config({"model": SHAPE | {"family": family}}))
    maker = PictureMaker(plan, "a model")
    broken = record_of(plan, 20, 3.0)
    broken.values["forward_second_moment"][4] = math.inf
    broken.values["gradient_variance"][5] = math.nan
    for record in (record_of(plan, 0), record_of(plan, 10), broken):
        maker.add(record)
        pictures = {picture.name: picture.pixels for picture in maker.draw(record)}
        assert {name.rpartition("/")[2] for name in pictures} == {*PREDICTED, "attention_logit_max", "attention_entropy", "dead_activations",
                                                                 "angular_distance"}
        assert sum(name.startswith("profile_over_time/") for name in pictures) == 3
    first, now = (maker.profile("forward_second_moment", record) for record in (record_of(plan, 0), broken))
    (axis,) = first.axes
    assert axis.get_yscale() == "log" and axis.get_ylim()[0] <= 0.5 and axis.get_ylim()[1] >= 2.0
    said = " ".join(text.get_text() for text in now.axes[0].texts)
    assert "iteration 20" in said and "a model" in said and "median 3" in said and "good: in the band" in said


def test_drawing_is_bounded_and_its_failure_ends_no_run(plan):
    drawn, said = [], []
    drawing = Drawing(10, lambda record: None, lambda record: (drawn.append(record.iteration), time.sleep(0.05)), said.append)
    for iteration in range(0, 100, 5):
        drawing.add(record_of(plan, iteration))
        time.sleep(0.01)
    drawing.close()
    # 0.05 s of drawing pays for 10 s: nothing but the first and the last one is due.
    assert drawn == [0, 95] and said == []

    broken = Drawing(1, lambda record: None, lambda record: 1 / 0, said.append)
    broken.add(record_of(plan, 0))
    broken.close()
    broken.add(record_of(plan, 1))
    assert len(said) == 1 and "ZeroDivisionError" in said[0] and "goes on without" in said[0]


def test_event_files_tell_the_story(plan, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = parse_config({"model": SHAPE, "training": {"run_dir": str(tmp_path / "my-run"), "train_iters": 10}})
    (tmp_path / "my-run").mkdir()
    (tmp_path / "my-run/config.yaml").write_text("model:\n  num_layers: 6\n")
    writer = MetricsWriter.of_run(config, plan, 1, print)
    writer.write(1, {name: 0.5 for name in SHOWN})
    writer.write_signal(record_of(plan, 0))
    writer.save()
    writer.close()
    (run,) = (tmp_path / "my-run/tensorboard").iterdir()
    events = EventAccumulator(str(run)).Reload()
    tags = events.Tags()
    assert run.name == "my-run"
    assert {*SHOWN.values()} <= {*tags["scalars"]} and events.Scalars("signal/forward_ratio_max")[0].value == pytest.approx(1.0)
    groups = sorted({name.partition("/")[0] for name in tags["scalars"] + tags["images"]})
    assert groups[:2] == ["loss", "profile"], "TensorBoard opens the first two groups"
    assert "profile_over_time/forward_second_moment" in tags["images"] and "weights/update_ratio_log10" in tags["histograms"]
    assert {"plan/text_summary", "config/text_summary", "signal/where/text_summary"} <= {*tags["tensors"]}
    curves = {tag for charts in LAYOUT.values() for _, tags in charts.values() for tag in tags}
    measured = curves - {*tags["scalars"]}
    assert measured == set(), "every curve of the layout has a scalar"
    assert (tmp_path / "my-run/signal.npz").exists()


def test_names_of_a_loss_with_parts():
    assert [shown(name) for name in ("train/loss", "train/masked_tokens", "validation/accuracy")] == [
        "loss/train", "loss/train_masked_tokens", "validation/accuracy"]


def test_peaks_by_the_names_that_makers_write():
    names = {"NVIDIA H100 80GB HBM3": 989.0, "NVIDIA H100 PCIe": 756.0, "NVIDIA A100-SXM4-80GB": 312.0, "NVIDIA L4": 121.0, "NVIDIA L40S": 362.0,
             "NVIDIA H200": 989.0, "NVIDIA GeForce RTX 4090": 165.2, "cpu": None, "NVIDIA A1000": None}
    assert {name: peak_tflops(name, "bf16") for name in names} == names
    assert peak_tflops("NVIDIA H100 80GB HBM3", "fp32") is None


def test_training_starts_without_matplotlib():
    code = "import sys; import megadsl.monitor.writer; sys.exit('matplotlib' in sys.modules or 'wandb' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_wandb_missing_is_a_sentence(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    check_wandb(MonitorConfig())
    with pytest.raises(UserError, match=r"monitor\.wandb .*pip install"):
        check_wandb(MonitorConfig(wandb=True))


def test_wandb_offline_gets_the_same_names(plan, tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="needs package wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    config = parse_config({"model": SHAPE, "training": {"run_dir": str(tmp_path)}, "monitor": {"wandb": True, "tensorboard": False}})
    (tmp_path / "config.yaml").write_text("model: {}\n")
    for first in (1, 3):  # begun and resumed
        writer = MetricsWriter.of_run(config, plan, first, print)
        writer.write(first, {"train/loss": 2.5})
        writer.write_signal(record_of(plan, first - 1))
        writer.close()
    logs = sorted(Path(tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    assert len(logs) == 2 and {log.stem for log in logs} == {f"run-{(tmp_path / 'wandb_id').read_text()}"}
    for name in (b"loss/train", b"signal/forward_ratio_max", b"profile/forward_second_moment", b"weights/update_ratio_log10", b"model.num_layers"):
        assert name in logs[0].read_bytes(), name
