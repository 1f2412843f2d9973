"""Status reports on a schedule, in a thread of their own.

Guarantees: one report at a time, missed ones are made up by one (coalesced), and a wall clock that jumps delays none:
what is overdue by the monotonic clock is written at once. A report that cannot be written is told, and the schedule
goes on.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

from cvm_translator.observe.alerts import Alert
from cvm_translator.runs.layout import RunLayout


class ScheduledReports:
    """Writes the status report every so often, in a thread of its own."""

    def __init__(
        self, layout: RunLayout, every_seconds: float, measure_idle: Callable[[], float | None] = lambda: None
    ) -> None:
        """`measure_idle` tells the seconds without progress by a monotonic clock, where somebody follows the run."""
        self.layout, self.every_seconds, self._measure_idle = layout, every_seconds, measure_idle
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
            write_status_report(self.layout.root, round(self.every_seconds), self._measure_idle())
        except Exception as error:  # a full disk, or what a run put into its files, must not end the monitor
            now = datetime.now(UTC).isoformat(timespec="seconds")
            reason = f"the status report was not written: {type(error).__name__}: {error}"
            with self._guard:
                self._failures.append(Alert(f"report_failed/{now[:13]}", "WARNING", reason, now))

    def take_failures(self) -> list[Alert]:
        with self._guard:
            failures, self._failures = self._failures, []
        return failures

    def close(self) -> None:
        """Stop the schedule and write the last report."""
        if self._scheduler is not None:
            self._scheduler.shutdown(wait=True)
            self._write()
