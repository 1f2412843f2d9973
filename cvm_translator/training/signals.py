"""SIGTERM and SIGINT ask the loop to save and leave; a second one leaves at once.

Inside `deferred()` (the loops) the handler only sets a flag: saving inside a handler would interrupt a save. Elsewhere
it raises `Stopped` at once, since every other stage writes atomically and is taken up again where it was. The original
handlers are put back.

A supervised process also leaves when its supervisor has died (SIGHUP): as if SIGTERM had come, but it never counts as
the first of two.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any

from cvm_translator.errors import Stopped
from cvm_translator.runs.heartbeat import SUPERVISOR_GONE


class StopRequest:
    """Context that turns the signals into `Stopped`. Outside the main thread, where Python allows no handlers, it only
    waits for `request`."""

    def __init__(self, *, is_supervised: bool = False) -> None:
        self.signal_number: int | None = None
        self.reason: str | None = None
        """Why, where it was no signal that somebody sent."""
        self._is_supervised = is_supervised
        self._was_signalled = False
        self._originals: dict[int, Any] = {}
        self._is_deferred = False

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Let the code inside ask for the flag when it is ready to leave."""
        self._is_deferred = True
        try:
            yield
        finally:
            self._is_deferred = False

    def request(self, signal_number: int = signal.SIGTERM, reason: str | None = None) -> None:
        """Ask to leave at the next moment when that is possible; what was asked first stays."""
        if self.signal_number is None:
            self.signal_number, self.reason = signal_number, reason

    def supervisor_is_gone(self) -> None:
        self.request(reason=SUPERVISOR_GONE)

    def raise_if_requested(self) -> None:
        if self.signal_number is not None:
            raise Stopped(self.signal_number)

    def _handle(self, signal_number: int, _: FrameType | None) -> None:
        if self._was_signalled:
            os._exit(128 + signal_number)
        self._was_signalled = True
        self._ask(signal_number)

    def _handle_hangup(self, *_: object) -> None:
        if self.signal_number is None:
            self._ask(signal.SIGTERM, SUPERVISOR_GONE)

    def _ask(self, signal_number: int, reason: str | None = None) -> None:
        self.request(signal_number, reason)
        if not self._is_deferred:
            raise Stopped(signal_number)

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._originals[number] = signal.signal(number, self._handle)
            if self._is_supervised:
                self._originals[signal.SIGHUP] = signal.signal(signal.SIGHUP, self._handle_hangup)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        for number, handler in self._originals.items():
            signal.signal(number, handler)
        self._originals.clear()
