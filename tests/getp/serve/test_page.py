"""The page at /, in a browser."""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.getp.serve.running import MODEL, RunningServer, wait_until
from tests.getp.serve.test_batches import finished, lines, start

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


class Browser:
    """Headless Chromium, through its debugging pipe: JSON messages that end with a zero byte."""

    def __init__(self, profile: Path) -> None:
        commands, self._commands = os.pipe()
        self._answers, answers = os.pipe()
        options = f"--headless --no-sandbox --disable-gpu --user-data-dir={profile}"
        line = f"exec {CHROMIUM} {options} --remote-debugging-pipe 3<&{commands} 4>&{answers}"
        self._process = subprocess.Popen(
            ["bash", "-c", line], pass_fds=(commands, answers), stderr=subprocess.DEVNULL
        )
        os.close(commands)
        os.close(answers)
        self._received, self._count = b"", 0
        self._session: str | None = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]

    def call(self, method: str, **params: Any) -> Any:
        self._count += 1
        message: dict[str, Any] = {"id": self._count, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self._received:
                data = os.read(self._answers, 1 << 16)
                assert data, "the browser has ended"
                self._received += data
            first, self._received = self._received.split(b"\0", 1)
            answer = json.loads(first)
            if answer.get("id") == self._count:
                assert "error" not in answer, answer
                return answer["result"]

    def value(self, expression: str) -> Any:
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        return found["result"].get("value")

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._commands)
        os.close(self._answers)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("there is no Chromium")
    found = Browser(tmp_path_factory.mktemp("profile"))
    yield found
    found.close()


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (400, "dark")])
def test_the_page_shows_the_server_and_answers_a_prompt(
    server: RunningServer, browser: Browser, width: int, scheme: str
) -> None:
    finished(server.client, start(server.client, lines(3)))
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.call("Emulation.setDeviceMetricsOverride", **size)
    feature = {"name": "prefers-color-scheme", "value": scheme}
    browser.call("Emulation.setEmulatedMedia", features=[feature])
    browser.call("Page.navigate", url=server.url)
    wait_until(lambda: browser.value("document.querySelector('h1')?.textContent") == MODEL)
    wait_until(lambda: browser.value("document.querySelector('figure b').textContent") != "")
    assert browser.value("document.documentElement.scrollWidth") <= width
    counts = "document.querySelector('#batches th:nth-child(5)')"
    assert browser.value(f"{counts}.getBoundingClientRect().right") <= width
    rows = browser.value("document.querySelector('#batches tbody').textContent")
    assert "completed" in rows
    assert "3 of 3" in rows
    bright = "getComputedStyle(document.body).color"
    assert (browser.value(bright) == "rgb(255, 255, 255)") == (scheme == "dark")
    browser.value("document.querySelector('#send').click()")
    answer = "[...document.querySelectorAll('#answer span:not(.thought)')]"
    wait_until(lambda: browser.value(f"{answer}.map(e => e.textContent).join('')") != "")
    wait_until(lambda: browser.value("document.querySelector('#stop').hidden"))
    assert browser.value(f"{answer}.map(e => e.textContent).join('')") == "42"
