"""The monitor's status report: on its schedule, of the state that the live view shows, and harmless."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from cvm_translator.observe.schedule import ScheduledReports
from cvm_translator.observe.status_report import write_status_report
from cvm_translator.observe.watch import RunWatch
from cvm_translator.runs.events import EventWriter
from cvm_translator.runs.layout import RunLayout
from cvm_translator.runs.lock import RunLock


def _wait_for(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def test_scheduled_report(make_run: Callable[..., Path]) -> None:
    root = make_run(until="distil")
    reports = ScheduledReports(RunLayout(root), every_seconds=0.2)
    reports.start()
    path = root / "monitor" / "status_report.md"
    _wait_for(path.exists)
    first = path.stat().st_mtime_ns
    _wait_for(lambda: path.stat().st_mtime_ns > first)
    reports.close()
    text = path.read_text()
    assert "dead: process 4242 is gone" in text and "BLEU" in text and "(plots/validation.png)" in text
    page = path.with_suffix(".html").read_text()
    assert "<script" not in page and "data:image/png;base64," in page
    assert threading.active_count() == 1 or not [t for t in threading.enumerate() if "APScheduler" in t.name]


def test_a_report_between_a_crash_and_the_restart(no_plots: None, make_run: Callable[..., Path]) -> None:
    """The supervisor is there: the run is not dead, in the report as in the live view."""
    root = make_run(until="distil")
    with RunLock(root / "supervisor.lock"):
        assert "restarting: process 4242 is gone" in write_status_report(root).read_text()
    assert "dead: process 4242 is gone" in write_status_report(root).read_text()


def test_a_report_looks_twice_before_it_says_dead(
    no_plots: None, make_run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that begins between the look at its lock and the one at its events."""
    root = make_run(until="distil")
    holders = iter([None, None, {"pid": 4242}, None])
    monkeypatch.setattr("cvm_translator.observe.status.read_holder", lambda path: next(holders))
    assert "running (process 4242)" in write_status_report(root).read_text()


def test_a_report_after_a_jump_of_the_clock_tells_no_stall(
    no_plots: None, watch_run: Callable[..., RunWatch], make_run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = make_run(until="distil")
    watch = watch_run(root)
    watch.poll()
    with EventWriter(root / "logs" / "events.jsonl") as events, RunLock(root / "run.lock"):
        events.write("train", step=1001, stage="distil", loss=1.0)
        watch.poll()
        real = time.time
        monkeypatch.setattr(time, "time", lambda: real() + 86400.0)
        reports = ScheduledReports(RunLayout(root), 1000.0, watch.idle_seconds)
        reports._write()
        assert "no step for" not in (root / "monitor" / "status_report.md").read_text()
        assert "no step for 1 d" in write_status_report(root).read_text()


def test_the_schedule_survives_a_clock_that_went_back(no_plots: None, make_run: Callable[..., Path]) -> None:
    root = make_run()
    reports = ScheduledReports(RunLayout(root), every_seconds=1000.0)
    reports.start()
    path = root / "monitor" / "status_report.html"
    _wait_for(path.exists)
    first = path.stat().st_mtime_ns
    reports._scheduler.modify_job("report", next_run_time=datetime.now(UTC) + timedelta(days=1))
    reports.rearm()
    assert reports._scheduler.get_job("report").next_run_time > datetime.now(UTC) + timedelta(hours=23)
    reports._written_at -= 2000.0
    reports.rearm()
    _wait_for(lambda: path.stat().st_mtime_ns > first)
    reports.close()


def test_a_report_that_cannot_be_written_is_told(make_run: Callable[..., Path]) -> None:
    root = make_run()
    (root / "monitor").write_text("in the way")
    reports = ScheduledReports(RunLayout(root), every_seconds=1000.0)
    reports._write()
    (alert,) = reports.take_failures()
    assert alert.name == "report_failed" and "monitor" in alert.message
    assert reports.take_failures() == []


def test_hostile_text_in_the_status_report(make_run: Callable[..., Path]) -> None:
    root = make_run(until="distil")
    with EventWriter(root / "logs" / "events.jsonl") as events:
        events.write("warning", step=1, code="x", message="<script>alert(1)</script> \x1b[2J [a](javascript:b)")
        events.write("failed", message="<img src=x onerror=alert(1)> \u202e")
    markdown = write_status_report(root).read_text()
    page = (root / "monitor" / "status_report.html").read_text()
    assert "<script" not in page and "<img src=x" not in page and "\\x1b[2J" in page
    assert "<script" not in markdown.replace("\\<", "") and "\x1b" not in markdown and "[a](" not in markdown
