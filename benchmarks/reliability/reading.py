"""Reading a run while it trains: is anything ever read torn, and what does it cost the run?

A small real run trains. First a real monitor writes its report every second, and this program reads: the status, in
turn with the report's page, its Markdown and its plots, and all along the events. Then a monitor at its defaults (a
look a second) is let go on and stopped in turns, and the mean time of a step is compared between windows with and
without it, pair by pair. Checked are:

- every status is of a running run, its step and its losses are there, and no step goes backwards;
- every report is whole: pages from beginning to end, plots that end as a PNG does, those in the page too;
- every line of the events is one event, and no step is missing;
- the median over the pairs of windows of what the monitor costs is below 2 % of a step's time.

    python -m benchmarks.reliability.reading

It begins anew each time. The program ends with 1 if a check fails.
"""

from __future__ import annotations

import argparse
import base64
import binascii
import json
import math
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks import common, evidence
from benchmarks.common import BenchmarkError
from benchmarks.reliability import tiny_run
from benchmarks.reliability.supervised import SupervisedRun
from cvm_translator.observe.status import read_status
from cvm_translator.runs.events import parse_event
from cvm_translator.runs.layout import RunLayout
from cvm_translator.runs.tail import FileTail

NAME = "reading"
# Steps of some hundredths of a second, without end; checkpoints, as any run has.
CHANGES: dict[str, Any] = {
    "teacher": {
        "training": {"batch_size": 512, "num_iterations": 1_000_000, "validate_every_steps": 1_000_000}
        | {"checkpoint_every_steps": 200},
    }
}
MAX_COST = 0.02
PNG_BEGIN, PNG_END = b"\x89PNG\r\n\x1a\n", b"IEND\xaeB`\x82"
EMBEDDED = re.compile(r'src="data:image/png;base64,([^"]*)"')

STATUS = "every status is of a running run, with step and losses, and no step goes backwards"
REPORT = "every report is whole, with its plots"
EVENTS = "every line of the events is one event, and no step is missing"
COST = f"the monitor costs less than {MAX_COST:.0%} of a step's time (median over pairs of windows)"


class Reader:
    """Reads one run folder again and again, and keeps what was torn."""

    def __init__(self, root: Path) -> None:
        self.layout = RunLayout(root)
        self.last_step = 0
        self.num_reads = {"status": 0, "report": 0, "lines of events": 0}
        self.failures: dict[str, list[str]] = {STATUS: [], REPORT: [], EVENTS: []}
        self._tail = FileTail(self.layout.events)
        self._last_train: int | None = None

    def read_status(self) -> None:
        self.num_reads["status"] += 1
        try:
            status = json.loads(json.dumps(read_status(self.layout.root)))
            step, loss = int(status["step"]), float(status["losses"]["last"])
        except (ValueError, TypeError, KeyError, OSError) as error:
            self.failures[STATUS].append(f"read {self.num_reads['status']}: {type(error).__name__}: {error}")
            return
        if status["state"] != "running" or step < self.last_step or not math.isfinite(loss):
            self.failures[STATUS].append(f"{status['state']}, step {step} after {self.last_step}, loss {loss}")
        self.last_step = max(self.last_step, step)

    def read_report(self) -> None:
        self.num_reads["report"] += 1
        monitor = self.layout.monitor
        page = (monitor / "status_report.html").read_text(encoding="utf-8")
        text = (monitor / "status_report.md").read_text(encoding="utf-8")
        plots = {path.name: path.read_bytes() for path in sorted((monitor / "plots").glob("*.png"))}
        for number, data in enumerate(EMBEDDED.findall(page), start=1):
            try:
                plots[f"plot {number} of the page"] = base64.b64decode(data, validate=True)
            except binascii.Error as error:
                self.failures[REPORT].append(f"plot {number} of the page: {error}")
        torn = [name for name, data in plots.items() if not (data.startswith(PNG_BEGIN) and data.endswith(PNG_END))]
        if not (page.lower().startswith("<!doctype html>") and page.rstrip().endswith("</html>")):
            torn.append("the page")
        if not (text.startswith("# Status report\n") and text.endswith("\n")):
            torn.append("the Markdown")
        self.failures[REPORT] += [f"read {self.num_reads['report']}: {name}" for name in torn]

    def read_events(self) -> None:
        for line in self._tail.poll_lines():
            self.num_reads["lines of events"] += 1
            event = parse_event(line)
            if event is None:
                self.failures[EVENTS].append(f"no event: {line[:80]!r}")
            elif event["kind"] == "train":
                if self._last_train is not None and event["step"] != self._last_train + 1:
                    self.failures[EVENTS].append(f"step {event['step']} after {self._last_train}")
                self._last_train = event["step"]

    def close(self) -> None:
        self._tail.close()


@contextmanager
def monitored(root: Path, *options: str) -> Iterator[subprocess.Popen[bytes]]:
    """A real monitor, from its first report on."""
    report = root / "monitor" / "status_report.html"
    report.unlink(missing_ok=True)
    process = subprocess.Popen(
        [*common.PROGRAM, "monitor", str(root), *options], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 120
        while not report.exists():
            if process.poll() is not None or time.monotonic() > deadline:
                raise BenchmarkError(f"the monitor wrote no report (exit code {process.poll()})")
            time.sleep(0.05)
        yield process
    finally:
        process.send_signal(signal.SIGCONT)
        process.terminate()
        process.wait()


def read_often(root: Path, num_reads: int) -> Reader:
    """Read status and report in turn, so many times together, while a monitor writes reports all the time."""
    reader = Reader(root)
    with monitored(root, "--report-every", "1", "--refresh", "0.2"):
        for number in range(num_reads):
            (reader.read_status if number % 2 else reader.read_report)()
            reader.read_events()
            time.sleep(0.01)
    reader.close()
    return reader


def measure_cost(run: SupervisedRun, num_pairs: int, seconds: float) -> list[tuple[float, float]]:
    """Mean seconds of a step (without, with a monitor) in each pair of windows; the order changes with each pair."""
    spans: list[tuple[bool, float, float]] = []
    with monitored(run.arm.folder) as monitor:
        time.sleep(seconds)
        for number in range(num_pairs):
            for is_watched in (False, True) if number % 2 else (True, False):
                monitor.send_signal(signal.SIGCONT if is_watched else signal.SIGSTOP)
                start = time.time()
                time.sleep(seconds)
                spans.append((is_watched, start, time.time()))
    run.follow()
    run.wait_for_save(run.find("checkpoint")[-1]["step"] + 1)  # what was buffered is written by then
    times = [
        (datetime.fromisoformat(before["time"]).timestamp(), datetime.fromisoformat(after["time"]).timestamp())
        for before, after in pairwise(run.events)
        if before["kind"] == after["kind"] == "train"
    ]
    means: dict[bool, list[float]] = {True: [], False: []}
    for is_watched, start, end in spans:
        means[is_watched].append(statistics.fmean(b - a for a, b in times if start <= a and b <= end))
    return list(zip(means[False], means[True], strict=True))


def run_benchmark(options: Namespace) -> dict[str, Any]:
    work = options.work.resolve()
    shutil.rmtree(work, ignore_errors=True)
    config = tiny_run.write_config(work, **CHANGES)
    with SupervisedRun(tiny_run.build_arm(work, "run", config)) as run:
        run.wait_for(lambda event: event["kind"] == "progress")
        reader = read_often(run.arm.folder, options.reads)
        run.follow()
        pairs = measure_cost(run, options.pairs, options.seconds)
    costs = [watched / alone - 1 for alone, watched in pairs]
    cost = statistics.median(costs)
    return {
        "num_reads": reader.num_reads,
        "num_steps": reader.last_step,
        "seconds": options.seconds,
        "pairs": pairs,
        "cost": cost,
        "cost_quartiles": statistics.quantiles(costs, n=4) if len(costs) > 1 else [cost] * 3,
        "step_seconds": statistics.median(alone for alone, _ in pairs),
        "failures": reader.failures | {COST: [f"{cost:.2%}"] if cost >= MAX_COST else []},
    }


def format_results(data: Mapping[str, Any]) -> str:
    """The checks and the figures as Markdown."""
    reads = data["num_reads"]
    low, _, high = data["cost_quartiles"]
    lines = [
        "# Reading a run while it trains",
        "",
        *evidence.describe_checks(data["failures"]),
        "",
        f"{reads['status']:,} reads of the status, {reads['report']:,} of the report while it was written every second,"
        f" {reads['lines of events']:,} lines of events, up to step {data['num_steps']:,}.",
        "",
        f"A monitor that looks once a second makes a step of {1000 * data['step_seconds']:.1f} ms"
        f" {data['cost']:+.2%} longer: the median over {len(data['pairs'])} pairs of windows of {data['seconds']:g} s;"
        f" half of the pairs lie between {low:+.2%} and {high:+.2%}.",
    ]
    return "\n".join(lines)


def build_parser() -> argparse.ArgumentParser:
    parser = common.build_plain_parser("Read a run's status, report and events while it trains.")
    parser.add_argument("--reads", type=int, default=1000, metavar="N", help="of status and report together")
    parser.add_argument(
        "--pairs", type=int, default=20, metavar="N", help="pairs of windows with and without a monitor"
    )
    parser.add_argument("--seconds", type=float, default=5.0, help="length of a window")
    parser.add_argument("--work", type=Path, default=common.RESULTS / "work" / NAME)
    return parser


def main() -> int:
    options = build_parser().parse_args()
    data = run_benchmark(options)
    return evidence.conclude(options.results, NAME, data, format_results(data))


if __name__ == "__main__":
    if sys.platform == "win32":
        sys.exit("error: this benchmark stops and continues a process: run it on Linux or macOS")
    common.run_main(main)
