"""The quick instance of benchmarks/reliability/reading.py: a process that writes, and a few hundred reads."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.reliability import reading
from cvm_translator.observe import plots
from cvm_translator.observe.status_report import write_status_report

NUM_READS = 300
WRITER = """
import os, sys, time
from pathlib import Path
from cvm_translator.runs.events import EventWriter
from cvm_translator.runs.lock import RunLock

root, step = Path(sys.argv[1]), 0
with RunLock(root / "run.lock"), EventWriter(root / "logs" / "events.jsonl") as events:
    events.write("run_started", run_id="w", pid=os.getpid(), num_iterations=10**6, stages=["distil"])
    events.write("stage_started", stage="distil")
    while True:
        for _ in range(7):
            step += 1
            events.buffer("train", step=step, stage="distil", loss=2.0, task_loss=2.0, skipped=False)
        events.write("progress", step=step, stage="distil", num_iterations=10**6, steps_per_second=500.0)
        time.sleep(0.01)
"""


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Path]:
    """A run folder that another process writes to all the time."""
    folder = tmp_path / "run"
    folder.mkdir()
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(folder)])
    try:
        deadline = time.monotonic() + 60
        while reading.read_status(folder)["step"] is None:
            assert time.monotonic() < deadline and writer.poll() is None
            time.sleep(0.02)
        yield folder
    finally:
        writer.kill()
        writer.wait()


def test_nothing_is_read_torn(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture = reading.PNG_BEGIN + bytes(100_000) + reading.PNG_END  # drawing is most of a report's time
    for name in ("training", "validation"):
        monkeypatch.setattr(plots, f"plot_{name}", lambda *arguments: picture)
    write_status_report(root)
    is_over = threading.Event()

    def write_reports() -> None:
        while not is_over.is_set():
            write_status_report(root)

    thread = threading.Thread(target=write_reports)
    thread.start()
    reader = reading.Reader(root)
    try:
        for number in range(NUM_READS):
            (reader.read_status if number % 2 else reader.read_report)()
            reader.read_events()
    finally:
        is_over.set()
        thread.join()
        reader.close()
    assert not any(reader.failures.values())
    assert reader.num_reads["status"] == reader.num_reads["report"] == NUM_READS // 2
    assert reader.last_step > 0


def test_what_is_torn_is_found(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plots, "plot_training", lambda *arguments: reading.PNG_BEGIN + b"cut off")
    write_status_report(root)
    page = root / "monitor" / "status_report.html"
    page.write_text(page.read_text().replace("</html>", ""))
    reader = reading.Reader(root)
    reader.read_report()
    reader.last_step = 10**9
    reader.read_status()
    reader.close()
    assert len(reader.failures[reading.REPORT]) >= 3
    assert len(reader.failures[reading.STATUS]) == 1
