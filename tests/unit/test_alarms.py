"""The alarms as functions of numbers: what raises one, when its episode ends, what a checkpoint keeps, what a healthy curve never does."""

import json
import math

import numpy as np
import pytest

from megadsl.config.alarms import AlarmsConfig
from megadsl.config.load import parse_config
from megadsl.errors import UserError
from megadsl.monitor.alarms import ADVICE, Episodes, Reading, SpikeWindow, StepAlarms, severest
from megadsl.monitor.signal import QUANTITIES, SignalRecord, points_of, predicted
from megadsl.monitor.signal_alarms import SignalAlarms
from megadsl.schemes.plan import SignalPlan
from megadsl.tasks.planning import plan_for_run

OPTIONS = AlarmsConfig()


def plan_of(scheme: str = "dslm", layers: int = 4, position: str = "pre") -> SignalPlan:
    return plan_for_run(parse_config({
        "model": {"num_layers": layers, "hidden_size": 64, "num_attention_heads": 4, "seq_length": 128, "norm_position": position},
        "scheme": {"name": scheme},
    }))


PLAN = plan_of()
POINTS = points_of(PLAN)
NAMES = [point.name for point in POINTS]


def record(iteration: int, changes: dict | None = None, parameters: dict | None = None, plan: SignalPlan = PLAN) -> SignalRecord:
    """What a model that follows its plan gives; `changes`: {quantity: {point: value}}."""
    points = points_of(plan)
    attention = np.array([point.kind == "self_attention" for point in points])
    values = {
        "forward_second_moment": predicted(plan, "forward_second_moment"), "gradient_variance": predicted(plan, "gradient_variance"),
        "attention_entropy": np.where(attention, 0.9, np.nan), "attention_logit_max": np.where(attention, 4.0, np.nan),
        "dead_activations": np.where([point.kind == "ffn" for point in points], 0.02, np.nan),
        "angular_distance": np.where([point.kind == "ffn" for point in points], 0.05, np.nan),
    }
    for quantity, at in (changes or {}).items():
        assert quantity in QUANTITIES
        values[quantity] = values[quantity].copy()
        for name, value in at.items():
            values[quantity][[point.name for point in points].index(name)] = value
    ratios = {f"decoder.{layer}.mlp.linear_fc1.weight": 0.01 for layer in range(4)} | (parameters or {})
    return SignalRecord(iteration, values, {"update_ratio": ratios})


def raised(alarms: SignalAlarms, *records: SignalRecord) -> list[tuple[str, int, int, str]]:
    return [(alarm.name, alarm.iteration, alarm.since, alarm.where) for one in records for alarm in alarms.observe(one)]


@pytest.mark.parametrize("name, changes, where", [
    ("variance_drift", {"forward_second_moment": {"decoder.2.ffn": 2000.0}}, "decoder.2.ffn"),
    ("variance_drift", {"forward_second_moment": {"decoder.0.self_attention": 1e-4}}, "decoder.0.self_attention"),
    ("gradient_ratio", {"gradient_variance": {"decoder.1.ffn": 5000.0}}, "decoder.1.ffn"),
    ("entropy_collapse", {"attention_entropy": {"decoder.3.self_attention": 0.01}}, "decoder.3.self_attention"),
    ("logit_growth", {"attention_logit_max": {"decoder.1.self_attention": 150.0}}, "decoder.1.self_attention"),
    ("dead_activations", {"dead_activations": {"decoder.2.ffn": 0.97}}, "decoder.2.ffn"),
    ("unused_layers", {"angular_distance": {"decoder.3.ffn": 1e-5}}, "decoder.3.ffn"),
])
def test_a_measured_number_beyond_its_limit_is_named_with_its_place(name, changes, where):
    alarms = SignalAlarms(OPTIONS, PLAN, POINTS)
    assert raised(alarms, record(0), record(100), record(200, changes), record(300, changes)) == [(name, 200, 200, where)]
    # It comes back, and goes again: another episode.
    assert raised(alarms, record(400), record(500, changes)) == [(name, 500, 500, where)]


@pytest.mark.parametrize("ratio, where", [(0.5, "decoder.9.mlp.linear_fc1.weight"), (1e-9, "decoder.9.mlp.linear_fc1.weight")])
def test_a_parameter_that_leaps_or_stands_still(ratio, where):
    alarms = SignalAlarms(OPTIONS, PLAN, POINTS)
    assert raised(alarms, record(0), record(100, parameters={where: ratio})) == [("update_ratio", 100, 100, where)]
    still = {f"decoder.{layer}.mlp.linear_fc1.weight": 0.0 for layer in range(4)}
    assert raised(SignalAlarms(OPTIONS, PLAN, POINTS), record(0), record(100, parameters=still)) == [], "the schedule has ended"


def test_step_0_is_compared_with_the_plan_and_later_ones_with_step_0():
    off = {"forward_second_moment": {name: 3.0 for name in NAMES}}
    assert [name for name, *_ in raised(SignalAlarms(OPTIONS, PLAN, POINTS), record(0, off))] == ["variance_drift"]
    assert raised(SignalAlarms(OPTIONS, PLAN, POINTS, drawn=False), record(0, off), record(100, off)) == []
    # What a trained stream does: it grows by an order of magnitude and more.
    grown = {"forward_second_moment": {name: 30.0 for name in NAMES}}
    assert raised(SignalAlarms(OPTIONS, PLAN, POINTS), record(0), record(100, grown)) == []


def test_xavier_post_norm_at_96_layers_is_caught_at_step_0_and_dslm_is_not():
    for scheme, expected in (("xavier", ["gradient_ratio"]), ("dslm", [])):
        plan = plan_of(scheme, 96, "post")
        alarms = SignalAlarms(OPTIONS, plan, points_of(plan)).observe(record(0, plan=plan))
        assert [alarm.name for alarm in alarms] == expected
        assert all("scheme=dslm" in alarm.line() for alarm in alarms)


def test_layers_whose_gate_is_trained_are_judged_once_they_have_been_in_use():
    plan = plan_of("rezero")
    closed = {"angular_distance": {f"decoder.{layer}.ffn": 0.0 for layer in range(4)}}
    alarms = SignalAlarms(OPTIONS, plan, points_of(plan))
    assert raised(alarms, record(0, closed, plan=plan), record(100, closed, plan=plan), record(200, plan=plan)) == []
    assert raised(alarms, record(300, closed, plan=plan)) == [("unused_layers", 300, 300, "decoder.0.ffn")]


def test_the_line_says_what_where_since_when_how_much_and_what_helps():
    alarms = SignalAlarms(OPTIONS, PLAN, POINTS)
    near, beyond = ({"attention_logit_max": {"decoder.1.self_attention": value, "decoder.2.self_attention": value}} for value in (80.0, 150.0))
    assert raised(alarms, record(0), record(100, near)) == []
    [alarm] = alarms.observe(record(200, beyond))
    assert alarm.line() == (
        "alarm logit_growth | iteration 200 at decoder.1.self_attention | largest logit 150 (limit 100; 2 of 4 points beyond) | "
        "since iteration 100 | action warn | usually helps: " + ADVICE["logit_growth"])
    assert "\n" not in alarm.line() and alarm.fine == 100
    assert json.loads(json.dumps(alarm.record()))["measured"] == 150.0


def test_hysteresis():
    episodes, found = Episodes({"a": "warn", "b": "off"}), []
    for iteration, excess in enumerate([0.5, 0.8, 1.1, 0.9, 1.2, 0.6, 1.3, math.nan]):
        for name in ("a", "b"):
            if alarm := episodes.update(name, iteration, Reading(excess, "", "", excess)):
                found.append((name, alarm.iteration, alarm.since, alarm.fine))
    assert found == [("a", 2, 1, 1), ("a", 6, 6, 5)]


def healthy_curve(steps: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A falling loss with noise that shrinks, and gradient norms that are log-normal."""
    rng, step = np.random.RandomState(seed), np.arange(steps)
    return 3.0 + 6.0 / (1 + step / 20) + 0.05 * rng.standard_normal(steps), np.exp(0.25 * rng.standard_normal(steps)) * (0.3 + 2 / (1 + step / 5))


def observe(alarms: StepAlarms, losses, norms, start: int = 1) -> list[tuple[str, int]]:
    return [(alarm.name, alarm.iteration) for index, (loss, norm) in enumerate(zip(losses, norms, strict=True))
            for alarm in alarms.observe(start + index, float(loss), float(norm), float(losses[0]))]


def test_healthy_curves_raise_nothing():
    for seed in range(20):
        assert observe(StepAlarms(OPTIONS, {}), *healthy_curve(600, seed)) == []


def test_spikes_are_raised_once_and_only_upwards():
    losses, norms = healthy_curve(200, 1)
    losses[100:103] += 2.0
    norms[150] *= 30
    losses[180], norms[190] = 0.5, 1e-4
    assert observe(StepAlarms(OPTIONS, {}), losses, norms) == [("loss_spike", 101), ("gradient_norm_spike", 151)]
    losses[5] += 5.0  # within min_steps there is nothing to compare with
    assert observe(StepAlarms(OPTIONS, {}), losses[:12], norms[:12]) == []


def test_a_loss_that_comes_back_to_its_start():
    losses, norms = healthy_curve(600, 2)
    # A slow rise: no step sticks out.
    losses[100:] += np.linspace(0, 12, 500)
    [(name, iteration)] = observe(StepAlarms(OPTIONS, {}), losses, norms)
    assert name == "divergence" and losses[iteration - 5] > losses[0]


def test_a_skewed_curve_is_no_spike():
    """A classifier that is nearly right: losses near 0, and one in ten batches holds a sample that it gets wrong."""
    rng = np.random.RandomState(3)
    losses = 0.01 + 0.002 * rng.standard_normal(400) + np.where(rng.uniform(size=400) < 0.2, rng.uniform(0.1, 0.4, 400), 0.0)
    assert observe(StepAlarms(OPTIONS, {}), np.concatenate([[1.4], losses]), np.full(401, 0.3)) == []


def test_what_is_not_finite_is_not_judged_and_not_kept():
    alarms = StepAlarms(OPTIONS, {})
    losses, norms = healthy_curve(60, 4)
    losses[30], norms[30], norms[40] = math.nan, math.inf, 0.0
    assert observe(alarms, losses, norms) == []
    assert len(alarms.state()["losses"]) == 59 and len(alarms.state()["log_gradient_norms"]) == 58


def test_resumed_alarms_say_what_undisturbed_ones_say():
    losses, norms = healthy_curve(200, 5)
    losses[90:130] += 2.0  # an episode in which the run is interrupted, and one after it
    norms[160] *= 100
    straight = observe(StepAlarms(OPTIONS, {}), losses, norms)
    assert straight == [("loss_spike", 91), ("gradient_norm_spike", 161)]
    before = StepAlarms(OPTIONS, {})
    said = observe(before, losses[:100], norms[:100])
    after = StepAlarms(OPTIONS, json.loads(json.dumps(before.state())))
    said += [(alarm.name, alarm.iteration) for i in range(100, 200) for alarm in after.observe(i + 1, losses[i], norms[i], losses[0])]
    assert said == straight
    complete = StepAlarms(OPTIONS, {})
    observe(complete, losses, norms)
    assert after.state() == complete.state()


def test_only_an_alarm_whose_action_is_skip_refuses_a_step():
    losses, norms = healthy_curve(100, 6)
    for action, expected in (("skip", "gradient_norm_spike"), ("warn", ""), ("rollback", ""), ("off", "")):
        alarms = StepAlarms(AlarmsConfig.model_validate({"gradient_norm_spike": {"action": action}}), {})
        observe(alarms, losses, norms)
        assert alarms.refuses(3.0, 500.0) == expected and alarms.refuses(30.0, 0.3) == ""


def test_the_window_forgets_and_a_new_level_becomes_the_usual():
    window = SpikeWindow(64, 16, np.full(64, 1.0))
    assert window.score(2.0, 0.01) == pytest.approx(100)
    for _ in range(40):
        window.add(2.0)
    assert window.score(2.0, 0.01) == 0.0 and len(window.values) == 64


def test_severest():
    losses, norms = healthy_curve(100, 7)
    options = AlarmsConfig.model_validate({"loss_spike": {"action": "stop"}, "gradient_norm_spike": {"action": "rollback"}})
    alarms = StepAlarms(options, {})
    observe(alarms, losses, norms)
    both = alarms.observe(101, 30.0, 500.0, 9.0)
    assert len(both) == 2 and severest(both).name == "loss_spike" and severest([]) is None


@pytest.mark.parametrize("values, sentence", [
    ({"loss_spike": {"action": "explode"}}, "monitor.alarms.loss_spike.action: input should be 'off', 'warn', 'skip', 'rollback' or 'stop'"),
    ({"logit_growth": {"action": "skip"}}, "monitor.alarms.logit_growth.action: input should be 'off', 'warn', 'rollback' or 'stop'"),
    ({"loss_spikes": {}}, "Unknown key monitor.alarms.loss_spikes; did you mean monitor.alarms.loss_spike?"),
    ({"window": 8, "min_steps": 16}, "min_steps 16 is more than window 8"),
])
def test_what_does_not_fit_is_a_sentence(values, sentence):
    with pytest.raises(UserError, match=sentence.replace("?", r"\?")):
        parse_config({"monitor": {"alarms": values}})
