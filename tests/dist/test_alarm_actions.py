"""What a run does about trouble that is really there: poisoned batches and a learning rate 30 times too high, in real small runs.

A poisoned batch has random labels. Processes are forked, so that they can be killed.
"""

import contextlib
import json
import os
import signal
import time
from pathlib import Path

import pytest
from ranks import ForkServer

from megadsl.checkpoint.manifest import read_manifest
from megadsl.checkpoint.store import CheckpointStore
from megadsl.config import Config
from megadsl.errors import UserError

MODEL = {"num_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "hidden_dropout": 0.1, "attention_dropout": 0.1}
BATCH = 8
# Iterations counted from 1. The poison lies in the data: it is read by the iteration that reads these samples.
POISONED = 36
POISON = range((POISONED - 1) * BATCH, POISONED * BATCH)


@pytest.fixture(scope="module")
def server():
    with ForkServer() as started:
        yield started


def configured(small_data, run_dir: Path, alarms: dict, iterations: int = 48, layout: dict | None = None, lr: float = 1e-2, **checkpoint) -> Config:
    return small_data.config(
        run_dir, model=MODEL, parallel=layout or {}, optimizer={"lr": lr, "lr_decay_style": "constant"},
        training={"train_iters": iterations, "eval_iters": 0, "hang_minutes": 0.0, "global_batch_size": BATCH},
        monitor={"alarms": alarms}, checkpoint={"save_interval": 10, "keep_last": 10, **checkpoint},
    )


class Poisoned:
    """A dataset some of whose samples have random labels."""

    def __init__(self, dataset, poison: range):
        self._dataset, self._poison = dataset, poison

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int):
        import torch

        sample = self._dataset[index]
        if index not in self._poison:
            return sample
        drawn = torch.randint(0, 512, sample["labels"].shape, generator=torch.Generator().manual_seed(index))
        return {**sample, "labels": drawn}


def run(config: Config, poison: range = POISON) -> str:
    """What the run said, its sentence included if it ended with one; stdout goes to RUN/log as it comes."""
    from megadsl.training.loop import train
    from megadsl.training.preflight import preflight

    folder = Path(config.training.run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / f"log-{os.environ['RANK']}", "a", buffering=1) as log, contextlib.redirect_stdout(log):
        try:
            ready = preflight(config)
            clean = ready.task.splits

            def splits(train_samples: int):
                found = clean(train_samples)
                found.train = Poisoned(found.train, poison)
                return found

            ready.task.splits = splits
            train(config, ready)
        except UserError as error:
            print(f"megadsl: {error}")
    return (folder / f"log-{os.environ['RANK']}").read_text()


def alarms_of(folder: Path) -> list[dict]:
    path = folder / "alarms.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def curve(folder: Path) -> list[tuple]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(row["iteration"], row["train/loss"], row["train/grad_norm"]) for row in rows if "train/loss" in row]


def tensors(folder: Path, iteration: int = 48) -> dict[str, str]:
    files = read_manifest(CheckpointStore(folder / "checkpoints").path(iteration)).files
    return {name: record.sha256 for name, record in files.items() if name.endswith("tensors")}


def resume_from(folder: Path, iteration: int) -> None:
    """As a run that was killed after `iteration` was saved."""
    CheckpointStore(folder / "checkpoints").remove_after(iteration)


def test_a_healthy_run_of_300_steps_raises_none(server, small_data, tmp_path):
    config = configured(small_data, tmp_path, {}, iterations=300, lr=3e-3)
    said = server.run(1, run, config, range(0))[0]
    assert "done at iteration 300" in said and "alarm" not in said and alarms_of(tmp_path) == []


def test_a_poisoned_batch_is_one_line(server, small_data, tmp_path):
    said = server.run(1, run, configured(small_data, tmp_path, {}))[0]
    [row] = alarms_of(tmp_path)
    assert (row["name"], row["iteration"], row["action"]) == ("loss_spike", POISONED, "warn")
    [line] = [line for line in said.splitlines() if line.startswith("alarm ")]
    assert line.startswith(f"alarm loss_spike | iteration {POISONED} | loss ") and "usually helps: " in line
    assert "done at iteration 48" in said and "skipped" not in said


SKIP = {"loss_spike": {"action": "skip"}}
ROLLBACK = {"loss_spike": {"action": "rollback"}}
LAYOUTS = [(1, {"zero_stage": 1}), (2, {"zero_stage": 0}), (2, {"zero_stage": 3}), (2, {"tensor_model_parallel_size": 2}),
           (2, {"pipeline_model_parallel_size": 2})]


@pytest.mark.parametrize("world, layout", LAYOUTS, ids=str)
def test_skip_leaves_the_step_out_on_all_ranks_and_resumes_exactly(server, small_data, tmp_path, world, layout):
    config = configured(small_data, tmp_path, SKIP, layout=layout, save_interval=1, keep_last=48)
    said = server.run(world, run, config)[0]
    assert "step skipped (monitor.alarms, action skip)" in said
    assert [row["iteration"] for row in alarms_of(tmp_path)] == [POISONED]
    info = read_manifest(tmp_path / "checkpoints" / "iteration-0000048").info
    assert (info.skipped_iterations, info.optimizer_steps, info.consumed_samples) == (1, 47, 48 * BATCH)
    # The next step starts from the weights before the skipped one: a step later it is as if there had been no such batch, the
    # position in the data and the dropout masks apart.
    straight, lines = tensors(tmp_path), (curve(tmp_path), alarms_of(tmp_path))
    resume_from(tmp_path, 30)
    server.run(world, run, config)
    assert tensors(tmp_path) == straight and (curve(tmp_path), alarms_of(tmp_path)) == lines


def test_a_skipped_step_changes_no_weight(server, small_data, tmp_path):
    """A run that ends before the poisoned step and one that ends with it have the same weights and moments."""
    for name, iterations in (("before", POISONED - 1), ("with", POISONED)):
        server.run(1, run, configured(small_data, tmp_path / name, SKIP, iterations=iterations))
    assert tensors(tmp_path / "before", POISONED - 1) == tensors(tmp_path / "with", POISONED)


def test_steps_that_are_refused_again_and_again_end_the_run(server, small_data, tmp_path):
    said = server.run(1, run, configured(small_data, tmp_path, SKIP), range(POISON.start, 1000))[0]
    assert "megadsl: 10 iterations in a row were refused by an alarm (monitor.alarms, action skip) or not finite" in said
    assert f"the last good checkpoint is {tmp_path / 'checkpoints' / 'iteration-0000030'}" in said


@pytest.mark.parametrize("world, layout", [LAYOUTS[0], LAYOUTS[2], LAYOUTS[4]], ids=str)
def test_rollback_goes_on_with_other_data_and_resumes_bit_equal_after_a_kill(server, small_data, tmp_path, world, layout):
    folder, straight = tmp_path / "killed", tmp_path / "straight"
    said = server.run(world, run, configured(small_data, straight, ROLLBACK, layout=layout))[0]
    window = [30, 30 * BATCH, POISONED * BATCH]
    assert f"went back to iteration 30; samples {window[1]} to {window[2] - 1} are left out (rollback 1 of at most 3)" in said
    info = read_manifest(straight / "checkpoints" / "iteration-0000048").info
    assert info.rollbacks == [window] and info.consumed_samples == (48 + POISONED - 30) * BATCH
    assert [row[0] for row in curve(straight)] == list(range(1, 49)), "what was rolled back is dropped from the curve"
    assert [(row["iteration"], row["rollbacks"]) for row in alarms_of(straight)] == [(POISONED, 0)]

    config = configured(small_data, folder, ROLLBACK, layout=layout)
    processes = server.start(world, run, config)
    log, deadline = folder / "log-0", time.monotonic() + 120
    while not (log.exists() and "went back" in log.read_text()) and time.monotonic() < deadline:
        time.sleep(0.005)
    for process in processes:
        os.kill(process, signal.SIGKILL)
    server.results()
    assert not (folder / "checkpoints" / "iteration-0000048").exists(), "it must be killed before its end"
    server.run(world, run, config)
    assert tensors(folder) == tensors(straight)
    assert curve(folder) == curve(straight) and alarms_of(folder) == alarms_of(straight)
    assert read_manifest(folder / "checkpoints" / "iteration-0000048").info.rollbacks == [window]
    # Resumed from what was saved after the rollback, without RUN/rollbacks.json: the checkpoint knows.
    resume_from(folder, 40)
    (folder / "rollbacks.json").unlink()
    server.run(world, run, config)
    assert tensors(folder) == tensors(straight)


def test_a_rollback_is_what_a_run_is_that_never_read_that_data(server, small_data, tmp_path):
    """The weights after the rollback are those of a run that resumes from the checkpoint behind the window."""
    rolled, fresh = tmp_path / "rolled", tmp_path / "fresh"
    server.run(1, run, configured(small_data, rolled, ROLLBACK))
    server.run(1, run, configured(small_data, fresh, ROLLBACK, iterations=30), range(0))
    (fresh / "rollbacks.json").write_text(json.dumps([[30, 30 * BATCH, POISONED * BATCH]]))
    said = server.run(1, run, configured(small_data, fresh, ROLLBACK), range(0))[0]
    assert "went back" not in said and tensors(fresh) == tensors(rolled)
    assert [row[1] for row in curve(fresh)] == [row[1] for row in curve(rolled)]


def test_after_max_rollbacks_the_run_ends_with_a_sentence(server, small_data, tmp_path):
    said = server.run(1, run, configured(small_data, tmp_path, {**ROLLBACK, "max_rollbacks": 2}), range(POISON.start, 10_000))[0]
    assert said.count("went back to iteration 30") == 2
    sentence = said.splitlines()[-1]
    assert sentence.startswith("megadsl: An alarm stops the run: loss_spike, ") and "gone back 2 times (monitor.alarms.max_rollbacks)" in sentence
    assert sentence.endswith(f"the last good checkpoint is {tmp_path / 'checkpoints' / 'iteration-0000030'}.")


def test_without_a_checkpoint_there_is_nothing_to_go_back_to(server, small_data, tmp_path):
    said = server.run(1, run, configured(small_data, tmp_path, ROLLBACK, save_interval=0))[0]
    assert "megadsl: An alarm asks to go back, but there is no checkpoint of iteration 35 or an earlier one; set checkpoint.save_interval" in said
    assert not list((tmp_path / "checkpoints").glob("iteration-*"))


@pytest.mark.parametrize("world", [1, 2])
def test_stop_saves_nothing_and_names_the_last_good_checkpoint(server, small_data, tmp_path, world):
    config = configured(small_data, tmp_path, {"loss_spike": {"action": "stop"}}, layout={"zero_stage": 1})
    every = server.run(world, run, config)
    assert all("megadsl: An alarm stops the run" in said for said in every)
    assert every[0].splitlines()[-1].endswith(
        f"(monitor.alarms, action stop); the last good checkpoint is {tmp_path / 'checkpoints' / 'iteration-0000030'}.")
    assert sorted(path.name for path in (tmp_path / "checkpoints").glob("iteration-*"))[-1] == "iteration-0000030"


def measured(small_data, run_dir: Path, alarms: dict, layers: int = 12, lr: float = 3e-3, iterations: int = 30, interval: int = 10,
             **sections) -> Config:
    """Deep enough for a signal, and it is measured."""
    return small_data.config(
        run_dir, model={"num_layers": layers, **sections.pop("model", {})}, optimizer={"lr": lr, "lr_decay_style": "constant"},
        training={"train_iters": iterations, "eval_iters": 0, "hang_minutes": 0.0},
        monitor={"alarms": alarms, "signal_interval": interval, "log_interval": 10}, checkpoint={"save_interval": 10, "keep_last": 10}, **sections,
    )


def test_a_healthy_run_raises_none_of_the_measured_ones(server, small_data, tmp_path):
    """300 steps; the same model and data that the runs below spoil."""
    said = server.run(1, run, measured(small_data, tmp_path, {}, iterations=300, interval=20), range(0))[0]
    assert "done at iteration 300" in said and len((tmp_path / "signal.jsonl").read_text().splitlines()) == 1 + 15
    assert alarms_of(tmp_path) == []


def test_a_learning_rate_30_times_too_high(server, small_data, tmp_path):
    """The loss shows nothing: it falls to that of a model without layers, and stays there. The signal does, at once."""
    config = measured(small_data, tmp_path, {"variance_drift": {"action": "stop"}}, lr=9e-2)
    said = server.run(1, run, config, range(0))[0]
    assert [(row["name"], row["iteration"]) for row in alarms_of(tmp_path)] == [("update_ratio", 0), ("variance_drift", 10)]
    sentence = said.splitlines()[-1]
    assert sentence.startswith("megadsl: An alarm stops the run: variance_drift, second moment ") and "none: nothing was saved" in sentence


def test_xavier_post_norm_at_96_layers_is_named_at_step_0(server, small_data, tmp_path):
    config = measured(small_data, tmp_path, {}, layers=96, iterations=1, model={"norm_position": "post"}, scheme={"name": "xavier"})
    said = server.run(1, run, config, range(0))[0]
    assert [(row["name"], row["iteration"]) for row in alarms_of(tmp_path)] == [("gradient_ratio", 0)]
    assert "alarm gradient_ratio | iteration 0 at decoder." in said and "scheme=dslm" in said


def scale_queries_and_keys(config: Config, iteration: int, factor: float) -> str:
    """Run with the queries' and keys' weights of one layer multiplied once, behind `iteration`."""
    from megadsl.training import loop

    class Scaled(loop.Run):
        done = False

        def _iteration(self, batches, interval) -> None:
            if self.position.iteration == iteration and not self.done:
                self.done = True
                [fragment] = [one for one in self.engine.state.fragments if one.name == "decoder.5.self_attention.linear_qkv.weight"]
                model = self.config.model
                heads = fragment.of(fragment.flat).view(model.num_attention_heads, 3, -1, model.hidden_size)
                heads[:, :2] *= factor
                self.engine.state._spread_weights()
            super()._iteration(batches, interval)

    loop.Run = Scaled
    return run(config, range(0))


def test_queries_and_keys_scaled_up_during_the_run(server, small_data, tmp_path):
    alarms = {"logit_growth": {"action": "rollback"}}
    said = server.run(1, scale_queries_and_keys, measured(small_data, tmp_path, alarms, iterations=60), 25, 20.0)[0]
    found = {(row["name"], row["iteration"], row["where"]) for row in alarms_of(tmp_path)}
    place = "decoder.5.self_attention"
    assert ("logit_growth", 30, place) in found and ("entropy_collapse", 30, place) in found, found
    # Measured at iteration 20 and fine then; what was saved at 30 would hold the trouble, and is not there to go back to.
    assert "went back to iteration 20; " in said and "done at iteration 60" in said and said.count("went back") == 1
    rows = [json.loads(line) for line in (tmp_path / "signal.jsonl").read_text().splitlines()[1:]]
    assert [row["iteration"] for row in rows] == [0, 10, 20, 30, 40, 50]


def go_back_to_weights_alone(config: Config) -> tuple:
    """Train, then load the last checkpoint as one that has no optimizer state: Adam's steps before and after, moments that are left."""
    from megadsl.checkpoint.weights import TensorReader
    from megadsl.training import loop

    found = []

    class Reloading(loop.Run):
        def _run(self) -> None:
            super()._run()
            state, checkpoint = self.engine.state, self.store.latest()
            found.append(state.steps())
            with TensorReader(checkpoint.path, checkpoint.manifest) as reader:
                state.load(reader, None, {})
            found.extend((state.steps(), any(tensor.any() for _, _, tensor in state.tensors(("exp_avg", "exp_avg_sq")))))

    loop.Run = Reloading
    run(config, range(0))
    return tuple(found)


@pytest.mark.parametrize("zero", range(4))
def test_going_back_to_a_checkpoint_without_optimizer_state_forgets_the_moments(server, small_data, tmp_path, zero):
    config = configured(small_data, tmp_path, {}, iterations=3, layout={"zero_stage": zero})
    assert server.run(1, go_back_to_weights_alone, config)[0] == (3, 0, False)
