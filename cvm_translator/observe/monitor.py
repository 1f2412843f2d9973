"""The monitor: follows a run, shows it, warns once, writes a status report on a schedule, and offers metrics.

It may start before, during or after a run; it only reads the run's files and writes to `monitor/`. A folder that does
not exist yet is waited for and never made. A run that finished or failed ends the monitor with a summary; one that was
stopped or killed is waited for, since it can be resumed. Ctrl-C leaves at once, and the run goes on.

Exit codes: 0 the run is done (or Ctrl-C, or a running run with `once`), 3 not running, 4 failed.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from cvm_translator.errors import EXIT_OK
from cvm_translator.observe.alerts import Alert, AlertBook, LowDisk, alerts_of_event, alerts_of_status
from cvm_translator.observe.delivery import Deliveries
from cvm_translator.observe.describe import format_status
from cvm_translator.observe.history import Event
from cvm_translator.observe.machine import MachineWatch
from cvm_translator.observe.schedule import ScheduledReports
from cvm_translator.observe.screens import END_STATES, JsonScreen, LineScreen, LiveScreen, Screen, View
from cvm_translator.observe.status import show_status
from cvm_translator.observe.targets import TargetOptions, build_targets
from cvm_translator.observe.watch import FileHints, RunWatch
from cvm_translator.runs.layout import RunLayout
from cvm_translator.runs.text import printable

if TYPE_CHECKING:
    from cvm_translator.observe.metrics import MetricsPort

LAST_DELIVERY_SECONDS = 15.0
"""How long a monitor whose run has ended waits for targets to take the last alerts."""


@dataclass(frozen=True)
class MonitorOptions:
    """How a run is followed."""

    as_json: bool = False
    report_every_seconds: float = 300.0
    refresh_seconds: float = 1.0
    targets: TargetOptions = field(default_factory=TargetOptions)
    """Who is told of alerts besides the log and the terminal."""
    metrics_port: int | None = None
    """Where Prometheus may ask; 0 takes a free port, None offers nothing."""
    metrics_host: str = "127.0.0.1"


def main(run_dir: str | Path, *, once: bool = False, as_json: bool = False, **options: Any) -> int:
    """Follow the run in `run_dir` until it ends; with `once` print one report and return.

    `options` are those of `MonitorOptions`. Raises CvmError for a target or a port that cannot be used.
    """
    if once:
        return show_status(run_dir, as_json=as_json)
    settings = MonitorOptions(as_json=as_json, **options)
    monitor = build_monitor(Path(run_dir), settings)
    with _interrupt_sets(monitor.left):
        try:
            last = monitor.follow()
        finally:
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


def build_monitor(run_dir: Path, settings: MonitorOptions) -> Monitor:
    """Wire a monitor; nothing is written yet."""
    layout = RunLayout(run_dir)
    deliveries = Deliveries(layout.monitor / "deliveries.jsonl", build_targets(settings.targets))
    metrics = None
    if settings.metrics_port is not None:
        from cvm_translator.observe.metrics import MetricsPort

        metrics = MetricsPort(settings.metrics_host, settings.metrics_port)
        print(f"metrics at {metrics.address}", file=sys.stderr)
    screen: Screen = JsonScreen() if settings.as_json else LiveScreen() if sys.stdout.isatty() else LineScreen()
    watch = RunWatch(layout)
    reports = ScheduledReports(layout, settings.report_every_seconds, watch.idle_seconds)
    return Monitor(watch, screen, reports, deliveries, metrics, settings.refresh_seconds)


class Monitor:
    """The loop: poll, warn, show, wait."""

    def __init__(
        self,
        watch: RunWatch,
        screen: Screen,
        reports: ScheduledReports,
        deliveries: Deliveries,
        metrics: MetricsPort | None = None,
        refresh_seconds: float = 1.0,
    ) -> None:
        self.watch, self.screen, self.reports, self.refresh_seconds = watch, screen, reports, refresh_seconds
        self.deliveries, self.metrics = deliveries, metrics
        self.book = AlertBook(watch.layout.monitor / "alerts.log")
        self.low_disk = LowDisk(self.book)
        self.hints = FileHints()
        self.view = View(watch, self.book, MachineWatch(watch.layout.root))
        self.left = threading.Event()
        """Set to make `follow` return at its next beat."""
        self._run_id: Any = None

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
                self._open_deliveries()
            self.view.machine.look(self.watch.holder)
            alerts = self._find_alerts(events, status)
            if self.metrics is not None:
                self.metrics.show(status, self.watch.history, self.view.machine.figures, self.book.told)
            self.screen.show(self.view, status, [] if is_first else events, alerts)
            is_first = False
            if status["state"] in END_STATES:
                return status
            self.hints.wait(self.refresh_seconds)
        return None

    def _open_deliveries(self) -> None:
        self.deliveries.open()
        if self.deliveries.notice is not None:
            print(printable(self.deliveries.notice), file=sys.stderr)
            self.deliveries.notice = None

    def _find_alerts(self, events: Sequence[Event], status: dict[str, Any]) -> list[Alert]:
        restarts = {id(event) for event in self.watch.history.restarts}
        found: list[Alert] = []
        for event in events:
            if event["kind"] == "run_started":
                self._run_id = event.get("run_id")
            found += alerts_of_event(event, run_id=self._run_id, is_restart=id(event) in restarts)
        low_since = self.low_disk.look(status)
        if status["state"] != "dead" or self.watch.is_surely_dead():
            found += alerts_of_status(status, low_since)
        found += self.reports.take_failures()
        # What is owed to the targets is noted before the log says that it was told: a monitor that dies in between
        # tells it again, and owes it once.
        self.deliveries.queue(self.book.find_new(found), status)
        return self.book.tell([*found, *self.deliveries.find_failures()])

    def close(self) -> None:
        """Leave: the terminal as it was, one last report, the last alerts delivered, no thread behind."""
        self.screen.close()
        self.hints.stop()
        self.reports.close()
        for line in self.deliveries.close(1.0 if self.left.is_set() else LAST_DELIVERY_SECONDS):
            print(printable(line), file=sys.stderr)
        if self.metrics is not None:
            self.metrics.close()
        self.watch.close()
