"""Debian's Chromium without a screen, driven by its own ChromeDriver over HTTP (W3C WebDriver): no package of Python is needed.

For a page that works, such as TensorBoard: one waits for what it shows. What only lies there is looked at by chromium.py.
"""

import base64
import json
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from ranks import free_port

needs_chromedriver = pytest.mark.skipif(
    not (shutil.which("chromium") and shutil.which("chromedriver")), reason="needs package chromium (and chromium-driver)")
FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--hide-scrollbars")
# What is seen, shadow roots included: document.body.innerText passes them over.
_SEEN = """
const words = [];
(function walk(node) {
  if (node.nodeType === Node.TEXT_NODE) words.push(node.textContent);
  if (node.nodeName === 'STYLE' || node.nodeName === 'SCRIPT') return;
  if (node.shadowRoot) walk(node.shadowRoot);
  node.childNodes.forEach(walk);
})(document.body);
return words.join(' ').replace(/\\s+/g, ' ');
"""


class Browser:
    """One window."""

    def __init__(self, port: int, profile: Path):
        self._server = f"http://127.0.0.1:{port}"
        options = {"args": [*FLAGS, f"--user-data-dir={profile}"], "binary": shutil.which("chromium")}
        self._session = ""
        value = self._call("POST", "/session", {"capabilities": {"alwaysMatch": {"goog:chromeOptions": options}}})
        self._session = f"/session/{value['sessionId']}"

    def open(self, url: str, width: int = 1500, height: int = 1100) -> None:
        self._call("POST", "/window/rect", {"width": width, "height": height})
        self._call("POST", "/url", {"url": "about:blank"})  # another #fragment alone would not load a page anew
        self._call("POST", "/url", {"url": url})

    def run(self, script: str):
        """The value that a script returns."""
        return self._call("POST", "/execute/sync", {"script": script, "args": []})

    def text(self) -> str:
        return self.run(_SEEN)

    def wait_for(self, script: str, seconds: float = 90):
        """The value of a script once it is true."""
        deadline = time.monotonic() + seconds
        while not (value := self.run(script)):
            assert time.monotonic() < deadline, f"{script} is not true after {seconds} s; the page says: {self.text()[:2000]}"
            time.sleep(0.3)
        return value

    def wait_for_text(self, *parts: str, seconds: float = 90) -> str:
        deadline = time.monotonic() + seconds
        while missing := [part for part in parts if part not in (text := self.text())]:
            assert time.monotonic() < deadline, f"the page does not show {missing} after {seconds} s, but: {text[:2000]}"
            time.sleep(0.3)
        return text

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self._call("GET", "/screenshot")))

    def close(self) -> None:
        self._call("DELETE", "")

    def _call(self, method: str, path: str, body: dict | None = None):
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._server + self._session + path, data, {"Content-Type": "application/json"}, method=method)
        with urllib.request.urlopen(request, timeout=120) as answer:
            return json.load(answer)["value"]


@contextmanager
def browser_window(folder: Path) -> Iterator[Browser]:
    """A window whose profile and log lie in `folder`."""
    port = free_port()
    with served(["chromedriver", f"--port={port}"], f"http://127.0.0.1:{port}/status", folder / "driver.log"):
        window = Browser(port, folder / "profile")
        yield window
        window.close()


@contextmanager
def served(command: list, url: str, log: Path) -> Iterator[None]:
    """A server that runs inside the block, and answers at `url` when it begins."""
    with open(log, "w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file)
    try:
        _wait_for_server(url, process, log)
        yield
    finally:
        process.terminate()
        process.wait(timeout=30)


def _wait_for_server(url: str, process: subprocess.Popen, log: Path, seconds: float = 120) -> None:
    """Until `url` answers; an AssertionError with the log where the process ends or the time is over."""
    deadline = time.monotonic() + seconds
    while True:
        assert process.poll() is None and time.monotonic() < deadline, f"{url} does not answer: {log.read_text()}"
        try:
            with urllib.request.urlopen(url, timeout=10):
                return
        except OSError:
            time.sleep(0.2)
