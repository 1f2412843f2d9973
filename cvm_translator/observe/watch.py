"""Following a run while it goes on: new events, new log lines, the process behind it.

Guarantees: files are only read; polling is the truth (device, inode and offset, see `EventTail`) and file-system events
merely wake it sooner, so a lost one costs a second and nothing else. How long a step has rested is measured by the
monotonic clock, so a wall clock that jumps raises no alarm.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import deque
from typing import Any

from cvm_translator.observe.history import Event, History
from cvm_translator.observe.status import find_state, summarise
from cvm_translator.runs.events import EventTail
from cvm_translator.runs.layout import RunLayout
from cvm_translator.runs.lock import read_holder


class RunWatch:
    """The state of one run folder, brought up to date by `poll`."""

    def __init__(self, layout: RunLayout, num_log_lines: int = 6) -> None:
        self.layout = layout
        self.history = History()
        self.holder: dict[str, Any] | None = None
        self.supervisor: dict[str, Any] | None = None
        self.log_lines: deque[str] = deque(maxlen=num_log_lines)
        self._events = EventTail(layout.events)
        self._log = EventTail(layout.train_log)
        self._advanced_at = time.monotonic()
        self._has_polled = False
        self._num_dead_polls = 0

    def poll(self) -> list[Event]:
        """Read what is new; returns the new events."""
        # The holder first: a run writes its last event before it lets go of the lock.
        self.holder = read_holder(self.layout.lock)
        self.supervisor = read_holder(self.layout.supervisor_lock)
        before = self.history.last_advance
        events = self._events.poll()
        for event in events:
            self.history.add(event)
        if self.history.last_advance != before:
            idle = max(0.0, time.time() - (self.history.last_advance or 0.0)) if not self._has_polled else 0.0
            self._advanced_at = time.monotonic() - idle
        self._has_polled = True
        self.log_lines.extend(line.decode("utf-8", "replace") for line in self._log.poll_lines())
        dead = find_state(self.history, self.holder, self.supervisor) == "dead"
        self._num_dead_polls = self._num_dead_polls + 1 if dead else 0
        return events

    def status(self) -> dict[str, Any]:
        """As `read_status`, but from what has been followed."""
        return summarise(self.layout, self.history, self.holder, time.time(), self.idle_seconds(), self.supervisor)

    def idle_seconds(self) -> float | None:
        """Time without progress, by the monotonic clock; None before there was any."""
        return time.monotonic() - self._advanced_at if self.history.last_advance is not None else None

    def is_surely_dead(self) -> bool:
        """Dead at two polls in a row: a process that has just started may hold its lock but an instant later."""
        return self._num_dead_polls >= 2

    def close(self) -> None:
        self._events.close()
        self._log.close()


class FileHints:
    """Wakes the monitor when a file in a folder changes; without it the monitor polls on its own beat."""

    def __init__(self) -> None:
        self.changed = threading.Event()
        self._observer: Any = None

    def start(self, layout: RunLayout) -> None:
        """Watch the run's logs, once the folder is there."""
        if self._observer is not None or not layout.logs.is_dir():
            return
        from watchdog.events import FileSystemEventHandler
        from watchdog.observers import Observer

        # An emitter that is stopped while it reads says so on standard error, which nobody needs to know.
        logging.getLogger("watchdog").setLevel(logging.CRITICAL)
        changed = self.changed

        class Handler(FileSystemEventHandler):
            def on_modified(self, event: Any) -> None:
                changed.set()

            def on_created(self, event: Any) -> None:
                changed.set()

            def on_moved(self, event: Any) -> None:
                changed.set()

        self._observer = Observer()
        self._observer.schedule(Handler(), str(layout.logs), recursive=False)
        # No watches left on this machine: polling sees everything as well, at most a second later.
        with contextlib.suppress(OSError):
            self._observer.start()

    def wait(self, seconds: float) -> None:
        """Sleep until something changed, `seconds` at most and a fifth of that at least."""
        time.sleep(seconds / 5)
        self.changed.wait(seconds * 4 / 5)
        self.changed.clear()

    def stop(self) -> None:
        if self._observer is not None and self._observer.is_alive():
            self._observer.stop()
            self._observer.join(timeout=5)
