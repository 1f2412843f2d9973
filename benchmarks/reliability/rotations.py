"""Does the tail lose or double a line while its file is rotated and emptied all the time? And what does a monitor cost
that has nothing to do?

A process appends numbered events and rotates the file: mostly by renaming, as a rotating log does, else by copying and
emptying, as logrotate's copytruncate does; some lines are written in two halves, and some rotations come in bursts. At
the same time another process follows the file with the tail that the monitor uses. Then a real `cvm-translator monitor`
watches a run folder in which nothing happens, once writing lines to a pipe and once drawing its view on a terminal.

    python -m benchmarks.reliability.rotations

The program ends with 1 if a line was lost or doubled, or if the monitor takes more than 2 % of a core.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import pty
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks import common, evidence
from cvm_translator.runs.events import EventTail, EventWriter
from cvm_translator.runs.lock import RunLock

NAME = "rotations"
NUM_BACKUPS = 100
"""Rotated files that are kept: lines in older ones are gone for whoever comes later."""
POLL_SECONDS = 0.02
COPY_SHARE, BURST_SHARE, HALF_SHARE = 0.3, 0.1, 0.05
MAX_SHARE = 0.02
REPORT_EVERY_SECONDS = 300.0
"""The monitor's default; the work of one report is spread over so long."""
MODULE = [sys.executable, "-m", "benchmarks.reliability.rotations"]


# ----------------------------------------------------------------------------------------------------------- the writer


class RotatingWriter:
    """Appends numbered events, and rotates."""

    def __init__(self, path: Path, seed: int) -> None:
        self.path, self.random, self.number = path, random.Random(seed), 0
        self.rotations: Counter[str] = Counter()
        path.parent.mkdir(parents=True, exist_ok=True)
        self._stream = open(path, "ab", buffering=0)  # noqa: SIM115 (exchanged at each rotation)

    def write(self) -> None:
        event = {"schema_version": 1, "time": time.time(), "kind": "train", "step": self.number}
        line = json.dumps(event).encode() + b"\n"
        self.number += 1
        if self.random.random() < HALF_SHARE:
            place = self.random.randrange(1, len(line))
            self._stream.write(line[:place])
            time.sleep(0.002)
            self._stream.write(line[place:])
        else:
            self._stream.write(line)

    def rotate(self) -> None:
        how = "copy" if self.random.random() < COPY_SHARE else "rename"
        self.rotations[how] += 1
        for number in range(NUM_BACKUPS, 0, -1):
            old = self.path.with_name(f"{self.path.name}.{number}")
            if old.exists():
                os.replace(old, self.path.with_name(f"{self.path.name}.{number + 1}"))
        newest = self.path.with_name(f"{self.path.name}.1")
        if how == "copy":
            shutil.copyfile(self.path, newest)
            os.truncate(self.path, 0)
        else:
            os.rename(self.path, newest)
            self._stream.close()
            self._stream = open(self.path, "ab", buffering=0)  # noqa: SIM115

    def run(self, num_rotations: int) -> None:
        while self.rotations.total() < num_rotations:
            for _ in range(3 if self.random.random() < BURST_SHARE else 1):
                for _ in range(self.random.randrange(1, 20)):
                    self.write()
                if self.rotations.total() < num_rotations:
                    self.rotate()
            time.sleep(self.random.uniform(0.0, 2 * POLL_SECONDS))
        self.write()
        self._stream.close()


# ----------------------------------------------------------------------------------------------------------- the reader


def follow(path: Path, out: Path, end: Path) -> None:
    """Follow `path` until `end` is there, and write down the numbers in the order in which they were told."""
    tail, told, num_polls = EventTail(path), [], 0
    is_over = False
    while not is_over:
        is_over = end.exists()
        told += [int(event["step"]) for event in tail.poll()]
        num_polls += 1
        if num_polls == 1:
            out.with_suffix(".ready").touch()
        time.sleep(POLL_SECONDS)
    told += [int(event["step"]) for event in tail.poll()]
    tail.close()
    out.write_text(json.dumps({"told": told, "num_polls": num_polls}))


@dataclass(frozen=True)
class Followed:
    """What came of it."""

    num_rotations: int
    num_copies: int
    num_lines: int
    num_polls: int
    lost: int
    doubled: int
    out_of_order: int
    seconds: float


def measure_tail(folder: Path, num_rotations: int, seed: int = 13) -> Followed:
    """Rotate a file so often while another process follows it."""
    path, out, end = folder / "logs" / "events.jsonl", folder / "told.json", folder / "end"
    writer = RotatingWriter(path, seed)
    reader = subprocess.Popen([*MODULE, "--follow", str(path), str(out), str(end)])
    try:
        while not out.with_suffix(".ready").exists():
            if reader.poll() is not None:
                raise RuntimeError(f"the reader ended with exit code {reader.returncode}")
            time.sleep(0.01)
        start = time.monotonic()
        writer.run(num_rotations)
        seconds = time.monotonic() - start
        end.touch()
        reader.wait(timeout=600)
    finally:
        reader.kill()
        reader.wait()
    data = json.loads(out.read_text())
    told = data["told"]
    counts = Counter(told)
    return Followed(
        num_rotations=writer.rotations.total(),
        num_copies=writer.rotations["copy"],
        num_lines=writer.number,
        num_polls=data["num_polls"],
        lost=sum(number not in counts for number in range(writer.number)),
        doubled=sum(count - 1 for count in counts.values()),
        out_of_order=sum(later < earlier for earlier, later in itertools.pairwise(told)),
        seconds=seconds,
    )


# ---------------------------------------------------------------------------------------------------- a monitor at rest


@dataclass(frozen=True)
class Rest:
    """Processor time of a monitor that has nothing to do, as shares of one core."""

    screen: str
    seconds: float
    num_looks: int
    look_seconds: float
    """Processor time of one look, of which there is one a second."""
    report_seconds: float
    """Processor time of one status report with its plots, measured by itself."""

    @property
    def share(self) -> float:
        """A look a second, and a report every five minutes: also where a busy machine lets it look less often."""
        return self.look_seconds + self.report_seconds / REPORT_EVERY_SECONDS


@contextmanager
def idle_run(root: Path, num_steps: int = 10_000) -> Iterator[Path]:
    """A run folder that is held and in which nothing happens: a run between two steps, for as long as it takes."""
    with RunLock(root / "run.lock"), EventWriter(root / "logs" / "events.jsonl") as events:
        events.write("run_started", run_id="idle", pid=os.getpid(), num_iterations=2 * num_steps, stages=["distil"])
        events.write("stage_started", stage="distil")
        for step in range(1, num_steps + 1):
            events.buffer("train", step=step, stage="distil", executed_step=step, loss=2.0 + 1 / step, task_loss=2.0,
                          distillation_loss=2.5, accuracy=0.5, learning_rate=1e-3, grad_norm=1.0, num_tokens=500,
                          skipped=False)  # fmt: skip
            if step % 1000 == 0:
                events.write("validation", step=step, stage="distil", scores={"bleu": 30.0, "chrf": 50.0},
                             teacher_scores={"bleu": 33.0, "chrf": 53.0}, quality_score=0.9 + step / 1e6,
                             retentions={"bleu": 0.91, "chrf": 0.94}, probes={}, seconds=5.0)  # fmt: skip
        events.write("progress", step=num_steps, stage="distil", num_iterations=2 * num_steps, steps_per_second=5.0,
                     tokens_per_second=2500.0, eta_seconds=2000.0, loss=2.0, distillation_loss=2.5, task_loss=2.0,
                     memory_mib=900.0)  # fmt: skip
        yield root


def measure_rest(root: Path, seconds: float, *, on_terminal: bool) -> Rest:
    """Processor time that a real monitor takes of an idle run, after its first report."""
    report = root / "monitor" / "status_report.html"
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "cvm_translator", "monitor", str(root)]
    master, slave = pty.openpty() if on_terminal else os.pipe()
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=slave, stderr=subprocess.DEVNULL)
    os.close(slave)
    threading.Thread(target=_drain, args=(master,), daemon=True).start()
    try:
        deadline = time.monotonic() + 600
        while not report.exists():
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the monitor wrote no report (exit code {process.returncode})")
            time.sleep(0.1)
        time.sleep(5)
        before, looks, start = _cpu_seconds(process.pid), _num_looks(process.pid), time.monotonic()
        time.sleep(seconds)
        used, passed = _cpu_seconds(process.pid) - before, time.monotonic() - start
        num_looks = _num_looks(process.pid) - looks
    finally:
        process.terminate()
        process.wait()
    screen = "terminal" if on_terminal else "pipe"
    return Rest(screen, passed, num_looks, used / max(1, num_looks), _measure_report(root))


def _drain(descriptor: int) -> None:
    try:
        while os.read(descriptor, 1 << 16):
            pass
    except OSError:
        os.close(descriptor)


def _cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _num_looks(pid: int) -> int:
    """How often the main thread has gone to sleep, halved: it sleeps twice between two looks."""
    (line,) = (row for row in Path(f"/proc/{pid}/status").read_text().splitlines() if row.startswith("voluntary"))
    return int(line.split()[1]) // 2


def _measure_report(root: Path) -> float:
    """Processor time of the second of two reports, so that loading the libraries is left out."""
    code = (
        "import sys, time; from cvm_translator.observe.status_report import write_status_report as write;"
        "write(sys.argv[1]); start = time.process_time(); write(sys.argv[1]); print(time.process_time() - start)"
    )
    return float(subprocess.run([sys.executable, "-c", code, str(root)], capture_output=True, check=True).stdout)


# -------------------------------------------------------------------------------------------------------------- program


def format_results(data: dict[str, Any]) -> str:
    tail = data["tail"]
    lines = [
        "# Rotations under a tail, and a monitor at rest",
        "",
        f"{tail['num_rotations']:,} rotations ({tail['num_copies']:,} by copying and emptying, the others by renaming)"
        f" of a file with {tail['num_lines']:,} lines in {tail['seconds']:.0f} s, followed by another process"
        f" ({tail['num_polls']:,} looks):",
        "",
        f"- lost: {tail['lost']}",
        f"- doubled: {tail['doubled']}",
        f"- out of order: {tail['out_of_order']}",
        "",
        "A monitor of an idle run, in processor time; together with a look a second and a report every 5 minutes:",
        "",
        "| screen | looks | a look | a report | together |",
        "| --- | --- | --- | --- | --- |",
    ]
    for rest in data["rest"]:
        looks = f"{rest['num_looks']} in {rest['seconds']:.0f} s"
        times = f"{1000 * rest['look_seconds']:.1f} ms | {rest['report_seconds']:.2f} s"
        lines.append(f"| {rest['screen']} | {looks} | {times} | {100 * rest['share']:.2f} % |")
    return "\n".join(lines)


def main() -> int:
    parser = common.build_plain_parser("Rotate a file under a tail, and watch a monitor at rest.")
    parser.add_argument("--num-rotations", type=int, default=1000, metavar="N")
    parser.add_argument("--rest-seconds", type=float, default=60.0, metavar="SECONDS")
    parser.add_argument("--seed", type=int, default=13)
    parser.add_argument("--follow", type=Path, nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.follow:
        follow(*options.follow)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        tail = measure_tail(Path(folder) / "tail", options.num_rotations, options.seed)
        with idle_run(Path(folder) / "run") as root:
            rests = [measure_rest(root, options.rest_seconds, on_terminal=flag) for flag in (False, True)]
    data = {"tail": asdict(tail), "rest": [asdict(rest) | {"share": rest.share} for rest in rests]}
    text = format_results(data)
    evidence.write_results(options.results, NAME, data, text)
    print(text)
    return int(bool(tail.lost or tail.doubled) or any(rest.share > MAX_SHARE for rest in rests))


if __name__ == "__main__":
    common.run_main(main)
