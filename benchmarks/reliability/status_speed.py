"""How long does `cvm-translator status --json` take on a run of 10,000 steps, from the shell's point of view?

Whole processes are timed, interpreter start included, after one that warms the disk's cache. Checked are the median
against the promised 300 ms on 2 cores, and that torch is not imported.

    python -m benchmarks.reliability.status_speed --run RUN_DIR
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks import common, evidence
from benchmarks.common import BenchmarkError
from cvm_translator.errors import EXIT_FAILED, EXIT_NOT_RUNNING, EXIT_OK
from cvm_translator.runs.events import read_events
from cvm_translator.runs.layout import RunLayout

NAME = "status_speed"
LIMIT_SECONDS = 0.3


def call_status(run_dir: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """One status command in a process of its own."""
    command = [sys.executable, *options, "-m", "cvm_translator", "status", str(run_dir), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode not in (EXIT_OK, EXIT_NOT_RUNNING, EXIT_FAILED):
        raise BenchmarkError(f"status failed: {done.stderr.strip()}")
    return done


def main() -> int:
    parser = common.build_plain_parser("Time the status command.")
    parser.add_argument("--run", type=Path, required=True, metavar="RUN_DIR", help="a run folder, finished or not")
    parser.add_argument("--repeats", type=int, default=20, metavar="N")
    options = parser.parse_args()
    status = json.loads(call_status(options.run).stdout)
    if status["state"] == "never_started":
        raise BenchmarkError(f"{options.run} holds no run")
    seconds = []
    for _ in range(options.repeats):
        start = time.perf_counter()
        call_status(options.run)
        seconds.append(time.perf_counter() - start)
    imported = call_status(options.run, "-X", "importtime").stderr
    is_light = all(line.rsplit("|", 1)[-1].strip() != "torch" for line in imported.splitlines())
    median = statistics.median(seconds)
    data: dict[str, Any] = {
        "num_events": sum(1 for _ in read_events(RunLayout(options.run).events)),
        "num_cores": os.cpu_count(),
        "seconds": seconds,
        "median_seconds": median,
        "failures": {
            f"the median is at most {LIMIT_SECONDS * 1000:.0f} ms": [] if median <= LIMIT_SECONDS else ["too slow"],
            "torch is not imported": [] if is_light else ["it is"],
        },
    }
    text = "\n".join(
        [
            "# The status command",
            "",
            *evidence.describe_checks(data["failures"]),
            "",
            f"`status --json` on a run with {data['num_events']:,} events, {options.repeats} calls on {os.cpu_count()}"
            f" cores: median {1000 * median:.0f} ms, slowest {1000 * max(seconds):.0f} ms.",
        ]
    )
    return evidence.conclude(options.results, NAME, data, text)


if __name__ == "__main__":
    common.run_main(main)
