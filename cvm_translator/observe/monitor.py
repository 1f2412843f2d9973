"""The monitor: follows a run, shows it, warns once, and writes a status report on a schedule.

It may start before, during or after a run; it only reads the run's files and writes to `monitor/`. A folder that does
not exist yet is waited for and never made. A run that finished or failed ends the monitor with a summary; one that was
stopped or killed is waited for, since it can be resumed. Ctrl-C leaves at once, and the run goes on.

Exit codes: 0 the run is done (or Ctrl-C, or a running run with `once`), 3 not running, 4 failed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
import time
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Protocol

from cvm_translator.errors import EXIT_ERROR, EXIT_OK, CvmError
from cvm_translator.observe.alerts import Alert, AlertBook, alerts_of_event, alerts_of_status
from cvm_translator.observe.describe import describe_event, format_status
from cvm_translator.observe.history import Event
from cvm_translator.observe.status import read_status
from cvm_translator.observe.text import printable
from cvm_translator.observe.watch import FileHints, ProcessWatch, RunWatch
from cvm_translator.runs.layout import RunLayout

DEFAULT_RUN_DIR = "distillation_output"
PROGRESS_LINE_SECONDS = 60.0
END_STATES = ("done", "failed")


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
    try:
        status = monitor.follow()
    except KeyboardInterrupt:
        monitor.close()
        print(f"monitor left; {printable(run_dir)} goes on without it", file=sys.stderr)
        return EXIT_OK
    monitor.close()
    if not as_json:
        print(format_status(status))
    return int(status["exit_code"])


class Monitor:
    """The loop: poll, warn, show, wait."""

    def __init__(self, watch: RunWatch, screen: Screen, report_every_seconds: float, refresh_seconds: float) -> None:
        self.watch, self.screen, self.refresh_seconds = watch, screen, refresh_seconds
        self.book = AlertBook(watch.layout.monitor / "alerts.log")
        self.hints = FileHints()
        self.process = ProcessWatch()
        self.reports = ScheduledReports(watch.layout, report_every_seconds)

    def follow(self) -> dict[str, Any]:
        """Until the run is done or failed; returns the last status."""
        is_first = True
        while True:
            events = self.watch.poll()
            status = self.watch.status()
            if status["state"] != "never_started":
                self.hints.start(self.watch.layout)
                self.reports.start()
                self.reports.rearm()
            alerts = self._find_alerts(events, status)
            self.screen.show(self, status, [] if is_first else events, alerts)
            is_first = False
            if status["state"] in END_STATES:
                return status
            self.hints.wait(self.refresh_seconds)

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


class ScheduledReports:
    """Writes the status report every so often, in a thread of its own."""

    def __init__(self, layout: RunLayout, every_seconds: float) -> None:
        self.layout, self.every_seconds = layout, every_seconds
        self._scheduler: Any = None
        self._failures: list[Alert] = []
        self._guard = threading.Lock()
        self._written_at = time.monotonic()

    def start(self) -> None:
        """Begin with a report at once; nothing if already begun."""
        if self._scheduler is not None:
            return
        from apscheduler.schedulers.background import BackgroundScheduler

        self._scheduler = BackgroundScheduler(daemon=True, timezone=UTC)
        self._scheduler.add_job(
            self._write,
            "interval",
            seconds=self.every_seconds,
            id="report",
            coalesce=True,
            max_instances=1,
            misfire_grace_time=None,
            next_run_time=datetime.now(UTC),
        )
        self._scheduler.start()

    def rearm(self) -> None:
        """Undo what a jump of the wall clock did to the schedule: by the monotonic clock a report is overdue."""
        if time.monotonic() - self._written_at > 1.5 * self.every_seconds + 5:
            self._written_at = time.monotonic()
            self._scheduler.modify_job("report", next_run_time=datetime.now(UTC) + timedelta(milliseconds=1))

    def _write(self) -> None:
        from cvm_translator.observe.status_report import write_status_report

        self._written_at = time.monotonic()
        if not self.layout.root.is_dir():
            return  # the folder was taken away; a reader does not make it again
        try:
            write_status_report(self.layout.root, round(self.every_seconds))
        except OSError as error:  # a full disk must not end the monitor, but be told
            now = datetime.now(UTC).isoformat(timespec="seconds")
            with self._guard:
                self._failures.append(
                    Alert(f"report_failed/{now[:13]}", "WARNING", f"the status report was not written: {error}", now)
                )

    def take_failures(self) -> list[Alert]:
        with self._guard:
            failures, self._failures = self._failures, []
        return failures

    def close(self) -> None:
        """Stop the schedule and write the last report."""
        if self._scheduler is not None:
            self._scheduler.shutdown(wait=True)
            self._write()


# ----------------------------------------------------------------------------------------------------------- screens


class Screen(Protocol):
    def show(
        self, monitor: Monitor, status: dict[str, Any], events: Sequence[Event], alerts: Sequence[Alert]
    ) -> None: ...

    def close(self) -> None: ...


class LiveScreen:
    """A view on a terminal that is drawn anew on every beat."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.live import Live

        self._live = Live(console=Console(), auto_refresh=False, transient=True, screen=False)
        self._live.start()

    def show(self, monitor: Monitor, status: dict[str, Any], events: Sequence[Event], alerts: Sequence[Alert]) -> None:
        from cvm_translator.observe.live import build_view

        watch = monitor.watch
        process = monitor.process.measure(watch.holder)
        view = build_view(
            watch.layout,
            status,
            watch.history,
            process,
            monitor.book.told,
            list(watch.log_lines),
            self._live.console.height,
        )
        self._live.update(view, refresh=True)

    def close(self) -> None:
        self._live.stop()


class LineScreen:
    """Plain lines for a pipe or a file: the state at first, then one line for every event of interest."""

    def __init__(self) -> None:
        self._state: str | None = None
        self._progress_at = 0.0

    def show(self, monitor: Monitor, status: dict[str, Any], events: Sequence[Event], alerts: Sequence[Alert]) -> None:
        if self._state is None or status["state"] != self._state:
            if status["state"] == "never_started":
                print(f"waiting for a run in {printable(status['run_dir'])}", flush=True)
            elif status["state"] not in END_STATES:
                print(format_status(status), flush=True)
        self._state = status["state"]
        for event in events:
            if (text := describe_event(event)) is not None:
                print(f"{printable(event.get('time'))[:19]} {printable(text)}", flush=True)
        for alert in alerts:
            print(f"{alert.time[:19]} ALERT {alert.level}: {printable(alert.message)}", flush=True)
        if (
            status["state"] == "running"
            and status["step"] is not None
            and time.monotonic() - self._progress_at >= PROGRESS_LINE_SECONDS
        ):
            self._progress_at = time.monotonic()
            print(self._progress_line(status), flush=True)

    def _progress_line(self, status: dict[str, Any]) -> str:
        from cvm_translator.observe.describe import describe_losses, describe_speed, describe_step

        parts = [describe_step(status), describe_speed(status), describe_losses(status["losses"] or {})]
        return f"{printable(status['stage'] or 'starting')}: {'; '.join(part for part in parts if part)}"

    def close(self) -> None:
        sys.stdout.flush()


class JsonScreen:
    """One status object a line, whenever the run has moved; alerts under `alerts`."""

    def __init__(self) -> None:
        self._last: tuple[Any, ...] | None = None

    def show(self, monitor: Monitor, status: dict[str, Any], events: Sequence[Event], alerts: Sequence[Alert]) -> None:
        mark = (status["state"], status["stage"], status["step"], status["attempt"], monitor.watch.history.num_events)
        if mark != self._last or alerts:
            told = [{"key": alert.key, "level": alert.level, "message": alert.message} for alert in alerts]
            print(json.dumps(status | {"alerts": told}, ensure_ascii=True), flush=True)
        self._last = mark

    def close(self) -> None:
        sys.stdout.flush()


# ---------------------------------------------------------------------------------------------------- command line


def main_cli(argv: Sequence[str] | None = None) -> int:
    """The command line of `monitor_distillation.py` and of `cvm-translator monitor`."""
    parser = argparse.ArgumentParser(
        prog="monitor_distillation.py",
        description="Follow a distillation run: live view, alerts, status reports. The run is only read.",
    )
    parser.add_argument("run_dir", nargs="?", default=DEFAULT_RUN_DIR, help="run folder (default: %(default)s)")
    parser.add_argument(
        "--once", action="store_true", help="print one report and exit (0 running or done, 3 not, 4 failed)"
    )
    parser.add_argument("--json", action="store_true", help="JSON instead of text: one object, or one a line")
    parser.add_argument(
        "--report-every", type=_positive, default=300.0, metavar="SECONDS", help="write monitor/status_report so often"
    )
    parser.add_argument("--refresh", type=_positive, default=1.0, metavar="SECONDS", help="look at the files so often")
    options = parser.parse_args(argv)
    if not options.once:
        os.nice(5)  # a run on a busy machine goes first
    try:
        return main(
            options.run_dir,
            once=options.once,
            as_json=options.json,
            report_every_seconds=options.report_every,
            refresh_seconds=options.refresh,
        )
    except CvmError as error:
        print(f"error: {printable(error)}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        print(f"error: {printable(error)}", file=sys.stderr)
        return EXIT_ERROR


def _positive(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


if __name__ == "__main__":
    sys.exit(main_cli())
