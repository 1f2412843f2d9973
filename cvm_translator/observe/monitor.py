"""The monitor: follows a run, shows it, warns once, and writes a status report on a schedule.

It may start before, during or after a run; it only reads the run's files and writes to `monitor/`. A folder that does
not exist yet is waited for and never made. A run that finished or failed ends the monitor with a summary; one that was
stopped or killed is waited for, since it can be resumed. Ctrl-C leaves at once, and the run goes on.

Exit codes: 0 the run is done (or Ctrl-C, or a running run with `once`), 3 not running, 4 failed.
"""

from __future__ import annotations

import contextlib
import json
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from cvm_translator.errors import EXIT_OK
from cvm_translator.observe.alerts import Alert, AlertBook, alerts_of_event, alerts_of_status
from cvm_translator.observe.describe import format_status
from cvm_translator.observe.history import Event
from cvm_translator.observe.schedule import ScheduledReports
from cvm_translator.observe.screens import END_STATES, JsonScreen, LineScreen, LiveScreen, Screen, View
from cvm_translator.observe.status import read_status
from cvm_translator.observe.text import printable
from cvm_translator.observe.watch import FileHints, ProcessWatch, RunWatch
from cvm_translator.runs.layout import RunLayout


def main(
    run_dir: str | Path,
    *,
    once: bool = False,
    as_json: bool = False,
    report_every_seconds: float = 300.0,
    refresh_seconds: float = 1.0,
) -> int:
    """Follow the run in `run_dir` until it ends; with `once` print one report and return."""
    if once:
        status = read_status(run_dir)
        print(json.dumps(status, ensure_ascii=True, indent=2) if as_json else format_status(status))
        return int(status["exit_code"])
    watch = RunWatch(RunLayout(Path(run_dir)))
    screen: Screen = JsonScreen() if as_json else LiveScreen() if sys.stdout.isatty() else LineScreen()
    monitor = Monitor(watch, screen, report_every_seconds, refresh_seconds)
    with _interrupt_sets(monitor.left):
        last = monitor.follow()
        monitor.close()
    if last is None:
        print(f"monitor left; {printable(run_dir)} goes on without it", file=sys.stderr)
        return EXIT_OK
    if not as_json:
        print(format_status(last))
    return int(last["exit_code"])


@contextlib.contextmanager
def _interrupt_sets(flag: threading.Event) -> Iterator[None]:
    """Ctrl-C sets the flag; a second one forces the exit. The original handler is put back.

    An exception out of the handler could be raised where Python drops it (in a finaliser) and the Ctrl-C be lost.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, frame: FrameType | None) -> None:
        if flag.is_set():
            raise KeyboardInterrupt
        flag.set()

    original = signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, original)


class Monitor:
    """The loop: poll, warn, show, wait."""

    def __init__(self, watch: RunWatch, screen: Screen, report_every_seconds: float, refresh_seconds: float) -> None:
        self.watch, self.screen, self.refresh_seconds = watch, screen, refresh_seconds
        self.book = AlertBook(watch.layout.monitor / "alerts.log")
        self.hints = FileHints()
        self.view = View(watch, self.book, ProcessWatch())
        self.reports = ScheduledReports(watch.layout, report_every_seconds)
        self.left = threading.Event()
        """Set to make `follow` return at its next beat."""

    def follow(self) -> dict[str, Any] | None:
        """Until the run is done or failed; returns the last status, or None when it was told to leave before."""
        is_first = True
        while not self.left.is_set():
            events = self.watch.poll()
            status = self.watch.status()
            if status["state"] != "never_started":
                self.hints.start(self.watch.layout)
                self.reports.start()
                self.reports.rearm()
            alerts = self._find_alerts(events, status)
            self.screen.show(self.view, status, [] if is_first else events, alerts)
            is_first = False
            if status["state"] in END_STATES:
                return status
            self.hints.wait(self.refresh_seconds)
        return None

    def _find_alerts(self, events: Sequence[Event], status: dict[str, Any]) -> list[Alert]:
        found = [alert for event in events for alert in alerts_of_event(event)]
        if status["state"] != "dead" or self.watch.is_surely_dead():
            found += alerts_of_status(status)
        found += self.reports.take_failures()
        return self.book.tell(found)

    def close(self) -> None:
        """Leave: the terminal as it was, one last report, no thread behind."""
        self.screen.close()
        self.hints.stop()
        self.reports.close()
        self.watch.close()
