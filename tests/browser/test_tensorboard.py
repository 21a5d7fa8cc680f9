"""TensorBoard on a real run's logs, looked at in a real browser: the first page tells the story, pictures are drawn, the layout is there."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from ranks import ForkServer, free_port
from webdriver import Browser, browser_window, needs_chromedriver, served

from megadsl.monitor.names import LAYOUT
from megadsl.monitor.signal import PREDICTED

pytestmark = needs_chromedriver
# Titles of what lies in the two groups that TensorBoard opens; it writes the group apart from the rest.
FIRST_PAGE = ("loss /train", "loss /validation", *(f"profile /{quantity}" for quantity in PREDICTED))
_PICTURES = "[...document.querySelectorAll('image-card img')].filter(image => image.complete && image.naturalWidth > 300).length"


@pytest.fixture(scope="module")
def logs(small_data, tmp_path_factory) -> Path:
    """The TensorBoard folder of a run of 6 layers."""
    config = small_data.config(
        tmp_path_factory.mktemp("runs") / "six-layers", training={"train_iters": 12, "eval_interval": 4},
        monitor={"log_interval": 2, "signal_interval": 2, "tensorboard": True},
    )
    with ForkServer() as server:
        server.run(1, _train, config)
    return Path(config.training.run_dir) / "tensorboard"


def _train(config) -> None:
    from megadsl.training.loop import train

    train(config)


@pytest.fixture(scope="module")
def address(logs, tmp_path_factory) -> Iterator[str]:
    """Of a TensorBoard on these logs."""
    found = f"http://127.0.0.1:{(port := free_port())}"
    program = Path(sys.executable).parent / "tensorboard"
    with served([program, "--logdir", logs, "--host", "127.0.0.1", "--port", str(port)], f"{found}/data/environment",
                tmp_path_factory.mktemp("tensorboard") / "log"):
        yield found


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator[Browser]:
    with browser_window(tmp_path_factory.mktemp("browser")) as window:
        yield window


def test_the_first_page_tells_the_story(browser, address, tmp_path):
    browser.open(f"{address}/#timeseries", height=2400)
    text = browser.wait_for_text("six-layers", *FIRST_PAGE)
    places = [text.index(title) for title in FIRST_PAGE[:3]]
    assert places == sorted(places), "the curves of the loss come first, then the profiles"
    browser.wait_for(f"return {_PICTURES} === {len(PREDICTED)}")
    assert browser.run("return document.querySelectorAll('line-chart').length") == 2
    browser.screenshot(tmp_path / "first-page.png")
    assert (tmp_path / "first-page.png").stat().st_size > 30_000


def test_the_layout_is_there(browser, address):
    browser.open(f"{address}/#custom_scalars")
    browser.wait_for_text(*LAYOUT, *LAYOUT["1 Does it learn"])
