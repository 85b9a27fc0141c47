"""A headless Chromium, driven by the DevTools protocol through two pipes: no port, no socket."""

import base64
import json
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from triptych.tests.helpers.limits import HANG_S

BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
COMMANDS_AT, ANSWERS_AT = 3, 4
"""The descriptors on which ``--remote-debugging-pipe`` reads and writes."""


def find_browser() -> str | None:
    """Its path; None where none is installed."""
    return next(filter(None, map(shutil.which, BROWSERS)), None)


class Browser:
    """One page that may be loaded, measured and photographed at any width."""

    def __init__(self, commands: int, answers: int) -> None:
        self._commands, self._answers = commands, os.fdopen(answers, "rb")
        self._number, self._session = 0, {}
        self.complaints: list[str] = []
        """Errors and warnings of the console, and refused loads, since ``open``."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = {"sessionId": attached["sessionId"]}
        for domain in ("Page", "Log", "Runtime", "Network"):
            self.call(f"{domain}.enable")

    def open(self, page: Path, *, width: int, dark: bool = False) -> None:
        """Load a file; returns when it is there, pictures and all."""
        self.complaints.clear()
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=900,
            deviceScaleFactor=1,
            mobile=False,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Page.navigate", url=page.absolute().as_uri())
        while self._next().get("method") != "Page.loadEventFired":
            pass

    def value(self, expression: str) -> Any:
        """What an expression of JavaScript comes to."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def picture(self, file: Path) -> None:
        """The whole page as PNG."""
        shot = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        file.write_bytes(base64.b64decode(shot["data"]))

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """A command of the protocol, and its answer."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params, **self._session}
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != self._number:
            pass
        assert "error" not in answer, answer
        return answer["result"]

    def _next(self) -> dict[str, Any]:
        """The next message; each ends with a zero byte."""
        text = bytearray()
        while (byte := self._answers.read(1)) != b"\0":
            assert byte, "the browser has gone"
            text += byte
        message = json.loads(text)
        if message.get("method") in ("Log.entryAdded", "Runtime.exceptionThrown"):
            self.complaints.append(json.dumps(message["params"]))
        if message.get("method") == "Network.requestWillBeSent":
            url = message["params"]["request"]["url"]
            if not url.startswith(("file:", "data:")):
                self.complaints.append(f"asked for {url}")
        return message


@contextmanager
def browser(program: str, folder: Path) -> Iterator[Browser]:
    """Start one with its profile in ``folder``; it ends with its pipe."""
    commands_read, commands = os.pipe()
    answers, answers_write = os.pipe()

    def take_pipes() -> None:
        first, second = os.dup(commands_read), os.dup(answers_write)
        os.dup2(first, COMMANDS_AT)
        os.dup2(second, ANSWERS_AT)

    options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    options += ["--remote-debugging-pipe", f"--user-data-dir={folder}", "--no-first-run"]
    options += ["--disable-dev-shm-usage", "--disable-background-networking"]
    with subprocess.Popen(
        [program, *options],
        preexec_fn=take_pipes,
        close_fds=False,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        os.close(commands_read)
        os.close(answers_write)
        hangs = threading.Timer(HANG_S, process.kill)
        hangs.start()
        try:
            yield Browser(commands, answers)
        finally:
            hangs.cancel()
            os.close(commands)
            process.terminate()
