"""A headless Chromium, spoken to over its debugging pipe: what a page has become, whatever its own policy forbids.

`Runtime.evaluate` looks at a page from outside, so the page that is judged is the delivered one, byte for byte: nothing
has to be added to it or taken from its Content-Security-Policy.
"""

from __future__ import annotations

import fcntl
import json
import os
import select
import subprocess
import tempfile
import time
from types import TracebackType
from typing import Any

from benchmarks.common import BenchmarkError

TIMEOUT_SECONDS = 300.0
READ_FD, WRITE_FD = 3, 4
"""Where the browser expects the two ends of its pipes."""


class Browser:
    """A context: one browser with a profile of its own, ended with it."""

    def __init__(self, path: str, *options: str) -> None:
        self._profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        command = [path, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--mute-audio"]
        command += [f"--user-data-dir={self._profile.name}", "--remote-debugging-pipe", *options, "about:blank"]
        read, self._write = os.pipe()
        self._read, write = os.pipe()
        to_browser, from_browser = (fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in (read, write))
        # The shell gives the pipes the numbers that the browser expects.
        shell = f'exec "$@" {READ_FD}<&{to_browser} {WRITE_FD}>&{from_browser}'
        self._process = subprocess.Popen(
            ["bash", "-c", shell, "bash", *command],
            pass_fds=(to_browser, from_browser),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for end in (read, write, to_browser, from_browser):
            os.close(end)
        self._partial = b""
        self._number = 0

    def open(self, url: str, settle_seconds: float = 2.0) -> Page:
        """A page in a tab of its own, loaded and left alone for a while, so that what is to come of it comes."""
        target = self.ask("Target.createTarget", {"url": "about:blank"})["targetId"]
        session = self.ask("Target.attachToTarget", {"targetId": target, "flatten": True})["sessionId"]
        self.ask("Page.enable", session=session)
        if error := self.ask("Page.navigate", {"url": url}, session=session).get("errorText"):
            raise BenchmarkError(f"the browser cannot open {url}: {error}")
        self._wait_for("Page.loadEventFired", session)
        time.sleep(settle_seconds)
        return Page(self, target, session)

    def ask(self, method: str, parameters: dict[str, Any] | None = None, session: str | None = None) -> dict[str, Any]:
        """The browser's answer. Raises BenchmarkError where it says that it cannot."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters or {}}
        if session is not None:
            message["sessionId"] = session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next_message()
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise BenchmarkError(f"the browser refuses {method}: {answer['error'].get('message')}")
                result: dict[str, Any] = answer["result"]
                return result

    def _wait_for(self, method: str, session: str) -> None:
        while True:
            message = self._next_message()
            if message.get("method") == method and message.get("sessionId") == session:
                return

    def _next_message(self) -> dict[str, Any]:
        while b"\0" not in self._partial:
            is_ready = select.select([self._read], [], [], TIMEOUT_SECONDS)[0]
            if not is_ready:
                raise BenchmarkError(f"the browser says nothing for {TIMEOUT_SECONDS:.0f} s")
            piece = os.read(self._read, 1 << 16)
            if not piece:
                raise BenchmarkError(f"the browser has ended (exit code {self._process.wait(TIMEOUT_SECONDS)})")
            self._partial += piece
        raw, self._partial = self._partial.split(b"\0", 1)
        message: dict[str, Any] = json.loads(raw)
        return message

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._write)
        os.close(self._read)
        self._profile.cleanup()


class Page:
    """A loaded page."""

    def __init__(self, browser: Browser, target: str, session: str) -> None:
        self._browser, self._target, self._session = browser, target, session

    def evaluate(self, expression: str) -> Any:
        """The value of an expression in the page. Raises BenchmarkError where it has none."""
        answer = self._browser.ask(
            "Runtime.evaluate", {"expression": expression, "returnByValue": True}, session=self._session
        )
        if "exceptionDetails" in answer or "value" not in answer["result"]:
            raise BenchmarkError(f"the page does not say what {expression!r} is: {answer}")
        return answer["result"]["value"]

    def close(self) -> None:
        self._browser.ask("Target.closeTarget", {"targetId": self._target})
