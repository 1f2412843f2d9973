"""A wall clock that jumps under a supervised run and its monitor: are reports on time, and is anything taken for hung?

Trainer, supervisor and monitor run with a small preloaded library (`wall_clock.c`, compiled on the spot) that shifts
their wall clock, and nothing else, by what this program says: a day and an hour to and fro, and to the last seconds
before daylight saving time begins, or in another run ends, in their time zone, which then pass. After each jump the
monitor's next reports are waited for. Checked are:

- each report comes as the schedule promises: within one and a half times its interval, five seconds and its own time;
- no trainer is taken for hung, and it trains on after each jump;
- the monitor raises no alarm of a stalled step, a dead process, a restart or a report that failed.

    python -m benchmarks.reliability.clock_jumps

It begins anew each time. The program ends with 1 if a check fails.
"""

from __future__ import annotations

import argparse
import os
import shutil
import struct
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks import common, evidence
from benchmarks.common import BenchmarkError
from benchmarks.reliability import tiny_run
from benchmarks.reliability.supervised import SupervisedRun

NAME = "clock_jumps"
CHANGES: dict[str, Any] = {
    "teacher": {"training": {"num_iterations": 1_000_000, "validate_every_steps": 1_000_000, "batch_size": 512}}
}
ZONE = "Europe/Berlin"
DAY, HOUR = 86_400.0, 3_600.0
CHANGES_OF_TIME = {
    "beginning": datetime(2027, 3, 28, 1, tzinfo=UTC).timestamp(),
    "end": datetime(2026, 10, 25, 1, tzinfo=UTC).timestamp(),
}
"""Of daylight saving time in that zone: a run each, begun twelve hours before."""
BEFORE_SECONDS = 4.0
REPORT_EVERY_SECONDS = 3.0
LATEST_SECONDS = 1.5 * REPORT_EVERY_SECONDS + 5.0 + 2.0
"""What the schedule promises, and 2 s for a look of the monitor's and the drawing of a report."""
NUM_REPORTS = 2
"""Waited for after each jump: one may have been on its way."""

ON_TIME = f"each report (one every {REPORT_EVERY_SECONDS:g} s) comes within {LATEST_SECONDS:g} s of the one before"
ALIVE = "no trainer is taken for hung, and it trains on after each jump"
QUIET = "the monitor raises no false alarm"
FALSE_ALARMS = ("stalled_step", "dead_process", "restart", "report_failed", "failed")
PROBE = """
import threading, time
start = time.monotonic()
threading.Event().wait(0.3)
print(time.time(), time.monotonic() - start)
"""


# ----------------------------------------------------------------------------------------------------------- the clock


class WallClock:
    """The wall clock of the processes that are started with `environment`."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        self._file, library = folder / "shift", folder / "wall_clock.so"
        self._file.write_bytes(struct.pack("q", 0))
        source = Path(__file__).with_name("wall_clock.c")
        done = subprocess.run(
            ["cc", "-shared", "-fPIC", "-O1", "-o", str(library), str(source), "-ldl"],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise BenchmarkError(f"{source} cannot be compiled: {done.stderr.strip()}")
        self.environment = {"LD_PRELOAD": str(library), "WALL_CLOCK_SHIFT": str(self._file), "TZ": ZONE}

    def set(self, shift_seconds: float) -> None:
        with open(self._file, "r+b") as stream:  # in place: the file is mapped
            stream.write(struct.pack("q", int(shift_seconds * 1e9)))

    def check(self) -> None:
        """Raise unless a Python under this clock sees the shift and still waits as long as it is told."""
        self.set(DAY)
        done = subprocess.run(
            [sys.executable, "-c", PROBE], capture_output=True, text=True, env=os.environ | self.environment, check=True
        )
        now, waited = (float(word) for word in done.stdout.split())
        self.set(0.0)
        if abs(now - time.time() - DAY) > 60 or not 0.3 <= waited < 3:
            raise BenchmarkError(
                f"this Python cannot be tested: shifted by {now - time.time():.0f} s, waits {waited} s"
            )


def list_jumps(base: float) -> dict[str, float]:
    """What is done to a clock with this shift, one after the other: the shift that it then has."""
    return {
        "a day forward": base + DAY,
        "a day back": base,
        "another day back": base - DAY,
        "a day forward again": base,
        "an hour forward": base + HOUR,
        "two hours back": base - HOUR,
    }


# ------------------------------------------------------------------------------------------------------------ watching


class Reports:
    """Sees when the monitor writes its report, by this process's monotonic clock."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._mark = self._look()
        self._last = time.monotonic()

    def _look(self) -> tuple[int, int]:
        status = self.path.stat()
        return status.st_ino, status.st_mtime_ns

    def wait_for_next(self) -> float:
        """Seconds between the last report and the next one; gives up long after it was due."""
        while (mark := self._look()) == self._mark and time.monotonic() - self._last < 3 * LATEST_SECONDS:
            time.sleep(0.02)
        now = time.monotonic()
        gap, self._mark, self._last = now - self._last, mark, now
        return gap


@contextmanager
def monitored(run: SupervisedRun, clock: WallClock) -> Iterator[Reports]:
    """A monitor under the same clock, from its first report on."""
    report = run.arm.layout.monitor / "status_report.html"
    command = [*common.PROGRAM, "monitor", str(run.arm.folder), "--refresh", "0.5"]
    with open(run.arm.layout.logs / "monitor.log", "wb") as log:
        monitor = subprocess.Popen(
            [*command, "--report-every", f"{REPORT_EVERY_SECONDS:g}"],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=os.environ | clock.environment,
        )
    try:
        deadline = time.monotonic() + 120
        while not report.exists():
            if monitor.poll() is not None or time.monotonic() > deadline:
                raise BenchmarkError(f"the monitor wrote no report: see {run.arm.layout.logs / 'monitor.log'}")
            time.sleep(0.05)
        yield Reports(report)
    finally:
        monitor.terminate()
        monitor.wait()


# ------------------------------------------------------------------------------------------------------------- program


def jump_once(
    run: SupervisedRun, reports: Reports, clock: WallClock, name: str, shift: float, failures: dict[str, list[str]]
) -> dict[str, Any]:
    """Set the clock, and wait for what the monitor and the trainer do then."""
    num_steps = len(run.find("train"))
    clock.set(shift)
    gaps = [reports.wait_for_next() for _ in range(NUM_REPORTS)]
    run.wait_for(lambda event: event["kind"] == "progress")
    if max(gaps) > LATEST_SECONDS:
        failures[ON_TIME].append(f"{name}: {max(gaps):.1f} s")
    if len(run.find("train")) <= num_steps:
        failures[ALIVE].append(f"{name}: no step")
    print(f"{name}: reports after {', '.join(f'{gap:.1f}' for gap in gaps)} s", flush=True)
    return {"jump": name, "gaps": gaps}


def run_under(work: Path, clock: WallClock, name: str, failures: dict[str, list[str]]) -> dict[str, Any]:
    """One run and its monitor through all jumps, in the day before a change of time."""
    arm = tiny_run.build_arm(work, name, tiny_run.write_config(work, **CHANGES))
    base = CHANGES_OF_TIME[name] - time.time() - 12 * HOUR
    clock.set(base)
    jumps = []
    with SupervisedRun(arm, environment=clock.environment) as run:
        run.wait_for(lambda event: event["kind"] == "progress")
        with monitored(run, clock) as reports:
            reports.wait_for_next()
            for what, shift in list_jumps(base).items():
                jumps.append(jump_once(run, reports, clock, what, shift, failures))
            what, shift = f"to the {name} of daylight saving time", CHANGES_OF_TIME[name] - BEFORE_SECONDS - time.time()
            jumps.append(jump_once(run, reports, clock, what, shift, failures))
    failures[ALIVE] += [event["message"] for event in run.find("warning", "restart")]
    alerts = arm.layout.monitor / "alerts.log"
    lines = alerts.read_text(encoding="utf-8").splitlines() if alerts.exists() else []
    failures[QUIET] += [line for line in lines if any(f" {code}/" in line for code in FALSE_ALARMS)]
    times = [datetime.fromisoformat(event["time"]).timestamp() for event in run.events]
    return {"jumps": jumps, "num_steps": len(run.find("train")), "span_days": (max(times) - min(times)) / DAY}


def run_benchmark(options: Namespace) -> dict[str, Any]:
    work = options.work.resolve()
    shutil.rmtree(work, ignore_errors=True)
    clock = WallClock(work / "clock")
    clock.check()
    failures: dict[str, list[str]] = {ON_TIME: [], ALIVE: [], QUIET: []}
    runs = {name: run_under(work, clock, name, failures) for name in CHANGES_OF_TIME}
    return {"runs": runs, "failures": failures}


def format_results(data: Mapping[str, Any]) -> str:
    """The checks and the table as Markdown."""
    runs = list(data["runs"].values())
    jumps = [jump for run in runs for jump in run["jumps"]]
    lines = [
        "# A wall clock that jumps",
        "",
        *evidence.describe_checks(data["failures"]),
        "",
        f"{len(jumps)} jumps under {len(runs)} supervised runs ({sum(run['num_steps'] for run in runs):,} steps), whose"
        f" events are dated over up to {max(run['span_days'] for run in runs):.1f} days:",
        "",
    ]
    rows = [[jump["jump"], *(f"{gap:.1f}" for gap in jump["gaps"])] for jump in jumps]
    header = ["the clock jumps", *(f"report {number}: s after the one before" for number in range(1, NUM_REPORTS + 1))]
    return "\n".join([*lines, evidence.markdown_table(header, rows)])


def build_parser() -> argparse.ArgumentParser:
    parser = common.build_plain_parser("Let the wall clock of a run and its monitor jump.")
    parser.add_argument("--work", type=Path, default=common.RESULTS / "work" / NAME)
    return parser


def main() -> int:
    options = build_parser().parse_args()
    data = run_benchmark(options)
    return evidence.conclude(options.results, NAME, data, format_results(data))


if __name__ == "__main__":
    if sys.platform != "linux":
        sys.exit("error: this benchmark preloads a library: run it on Linux")
    common.run_main(main)
