"""Signals as something that can be waited for beside a pipe.

The handlers only take notes; SIGCHLD wakes the wait as well. The original handlers are put back.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import time
from types import FrameType
from typing import Any

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Inbox:
    """Context in which SIGTERM and SIGINT are collected in `stops`, oldest first."""

    def __init__(self) -> None:
        self.stops: list[int] = []
        self._originals: dict[int, Any] = {}
        self._read = self._write = -1
        self._original_wakeup = -1

    def __enter__(self) -> Inbox:
        self._read, self._write = os.pipe()
        os.set_blocking(self._read, False)
        os.set_blocking(self._write, False)
        self._original_wakeup = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        for number in STOP_SIGNALS:
            self._originals[number] = signal.signal(number, self._note)
        self._originals[signal.SIGCHLD] = signal.signal(signal.SIGCHLD, lambda *_: None)
        return self

    def _note(self, number: int, _: FrameType | None) -> None:
        self.stops.append(number)

    def wait(self, seconds: float, descriptor: int | None = None) -> None:
        """Return after so long, or sooner when a signal came, a child ended or `descriptor` has something to read."""
        poll = select.poll()
        poll.register(self._read, select.POLLIN)
        if descriptor is not None:
            poll.register(descriptor, select.POLLIN)
        poll.poll(max(0.0, seconds) * 1000)
        with contextlib.suppress(BlockingIOError):
            os.read(self._read, 4096)

    def wait_for_stop(self, seconds: float) -> bool:
        """Whether a stop was asked for within so long, or had been before."""
        deadline = time.monotonic() + seconds
        while not self.stops and (rest := deadline - time.monotonic()) > 0:
            self.wait(rest)
        return bool(self.stops)

    def __exit__(self, *_: object) -> None:
        signal.set_wakeup_fd(self._original_wakeup)
        for number, handler in self._originals.items():
            signal.signal(number, handler)
        os.close(self._read)
        os.close(self._write)
