"""TensorBoard on a real run's logs, looked at in a real browser: the first page tells the story, pictures are drawn, the layout is there."""

import math
from pathlib import Path

import numpy as np
import pytest
from ranks import ForkServer

from megadsl.monitor.display import EventFiles
from megadsl.monitor.names import LAYOUT
from megadsl.monitor.signal import PREDICTED, SignalRecord, points_of, predicted
from megadsl.monitor.writer import MetricsWriter
from megadsl.tasks.planning import plan_for_run

ITERATIONS = 12
# Titles of what lies in the two groups that TensorBoard opens; it writes the group apart from the rest.
FIRST_PAGE = ("loss /train", "loss /validation", *(f"profile /{quantity}" for quantity in PREDICTED))
_PICTURES = "return [...document.querySelectorAll('image-card-component img, image-card img')].filter(i => i.complete && i.naturalWidth > 300).length"


@pytest.fixture(scope="module")
def logs(small_data, tmp_path_factory):
    """The TensorBoard folder of a run of 6 layers."""
    config = small_data.config(
        tmp_path_factory.mktemp("runs") / "six-layers", training={"train_iters": ITERATIONS, "eval_interval": 4},
        monitor={"log_interval": 2, "tensorboard": True},
    )
    with ForkServer() as server:
        server.run(1, _train, config)
    return _run_folder(config) / "tensorboard"


def _run_folder(config) -> Path:
    return Path(config.training.run_dir)


def _train(config) -> None:
    from megadsl.training.loop import train

    train(config)
    _measure(config)


def _measure(config) -> None:
    """A signal as planned with 3 % noise, written as the loop writes it."""
    folder, plan = _run_folder(config), plan_for_run(config)
    points, random = points_of(plan), np.random.default_rng(1)
    writer = MetricsWriter(folder, ITERATIONS + 1, [EventFiles(folder / "tensorboard" / folder.name, ITERATIONS + 1)], plan, "six layers", 1)
    for iteration in range(0, ITERATIONS, 4):
        values = {name: predicted(plan, name) * np.exp(random.normal(0, 0.03, len(points))) for name in PREDICTED}
        values["attention_logit_max"] = np.array([2.0 if point.kind == "self_attention" else math.nan for point in points])
        writer.write_signal(SignalRecord(iteration, values))
    writer.close()


def test_the_first_page_tells_the_story(browser, serve_tensorboard, logs, tmp_path):
    address = serve_tensorboard(logs)
    browser.open(f"{address}/#timeseries", height=2400)
    text = browser.wait_for_text("six-layers", *FIRST_PAGE)
    places = [text.index(title) for title in FIRST_PAGE[:3]]
    assert places == sorted(places), "the curves of the loss come first, then the profiles"
    assert browser.wait_for(f"return (() => {{ {_PICTURES} }})() >= {len(PREDICTED)}"), "every profile's picture is drawn"
    assert browser.run("return document.querySelectorAll('line-chart canvas, line-chart svg').length") >= 2
    browser.screenshot(tmp_path / "first-page.png")
    assert (tmp_path / "first-page.png").stat().st_size > 30_000


def test_the_layout_is_there(browser, serve_tensorboard, logs):
    browser.open(f"{serve_tensorboard(logs)}/#custom_scalars")
    browser.wait_for_text(*LAYOUT, *LAYOUT["1 Does it learn"])
