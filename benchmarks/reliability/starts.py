"""A hundred `cvm-translator start` commands on one run folder, let go at the same moment: one wins.

Checked are:

- exactly one command succeeds, and the run it started holds the folder's lock;
- every other ends with exit code 1 and one line that says which process has the folder, and what to do;
- only the run that won imports torch (told by Python's own import times, in what all processes print);
- a lock left behind blocks nothing: after SIGKILL, and with a lock file that is empty, garbled, or names a process
  that lives but is another one, the next start wins.

    python -m benchmarks.reliability.starts

It begins anew each time. The program ends with 1 if a check fails.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from benchmarks import common, evidence
from benchmarks.common import BenchmarkError
from benchmarks.reliability.tiny_run import spell
from cvm_translator.runs.layout import RunLayout
from cvm_translator.runs.lock import read_holder

NAME = "starts"
TIMEOUT_SECONDS = 1200.0
MESSAGE = re.compile(r"error: .+ is in use by process (\d+|unknown) on .+: .*stop it with cvm-translator stop .+")
IMPORTED_TORCH = re.compile(r"^import time:.*\| *torch$", re.MULTILINE)

ONE = "exactly one start wins, and its run holds the lock"
TOLD = "every other is told in one line who has the folder, with exit code 1"
LIGHT = "at most one process imports torch"
STALE = "a lock that was left behind blocks no start"

MODEL = {"dim": 16, "num_heads": 2, "feed_forward_dim": 32, "encoder_layers": 1, "decoder_layers": 1}
CONFIG: dict[str, Any] = {
    "num_threads": 1,
    "tensorboard": False,
    "corpus": {
        "train": [{"format": "tsv", "path": "numbers.tsv"}],
        "validation_size": 20,
        "test_size": 20,
        "cleaning": {"language_check": False},
    },
    "tokenizer": {"vocab_size": 300},
    # So long that the winner still runs when the last command has been told so.
    "teacher": {"model": MODEL, "training": {"num_iterations": 1_000_000, "batch_size": 8, "warmup_steps": 10}},
    "student": {"model": MODEL},
    "validation": {"metrics": ["bleu", "chrf"], "weights": {"bleu": 1.0, "chrf": 1.0}},
}


def write_config(work: Path) -> Path:
    """A config of a tiny run, and its text: digits in words."""
    work.mkdir(parents=True)
    lines = [f"{spell(number, 'de')}\t{spell(number, 'en')}" for number in range(1000, 2000)]
    (work / "numbers.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    path = work / "tiny.yaml"
    path.write_text(yaml.safe_dump(CONFIG), encoding="utf-8")
    return path


# ------------------------------------------------------------------------------------------------------------- starting


def start_at_once(command: list[str], number: int) -> list[dict[str, Any]]:
    """Launch `number` commands that wait for one pipe to close, close it, and gather how each ended."""
    gate, opener = os.pipe()
    environment = os.environ | {"PYTHONPROFILEIMPORTTIME": "1", "OMP_NUM_THREADS": "1"}
    waiting = ["sh", "-c", 'read -r _; exec "$@" </dev/null', "sh", *command]
    processes = [
        subprocess.Popen(
            waiting, stdin=gate, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        )
        for _ in range(number)
    ]
    os.close(gate)
    start = time.monotonic()
    os.close(opener)
    ended = []
    for process in processes:
        output, errors = process.communicate(timeout=TIMEOUT_SECONDS)
        told = [line for line in errors.splitlines() if line and not line.startswith("import time:")]
        ended.append(
            {
                "exit_code": process.returncode,
                "output": output.strip(),
                "told": told,
                "imports_torch": bool(IMPORTED_TORCH.search(errors)),
                "seconds": time.monotonic() - start,
            }
        )
    return ended


def end_run(run_dir: Path) -> None:
    """SIGKILL everything that a start has launched: its session, and whoever holds the lock."""
    holder = read_holder(RunLayout(run_dir).lock)
    pids = {int(pid) for pid in ([holder["pid"]] if holder and holder.get("pid") else [])}
    pids |= {pid for pid in (find_parent(pid) for pid in list(pids)) if pid is not None}
    for pid in sorted(pids):
        with contextlib.suppress(ProcessLookupError):
            group = os.getpgid(pid)
            if group != os.getpgrp():  # a start command that still waits is of this program's own group
                os.killpg(group, signal.SIGKILL)
    deadline = time.monotonic() + 60
    while read_holder(RunLayout(run_dir).lock) is not None:
        if time.monotonic() > deadline:
            raise BenchmarkError(f"{run_dir} is still held after SIGKILL")
        time.sleep(0.05)


def find_parent(pid: int) -> int | None:
    """The parent that supervises a run, if its own command line names the program."""
    try:
        parent = int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
        command = Path(f"/proc/{parent}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return None
    return parent if b"cvm_translator" in command else None


def start_with_stale_lock(command: list[str], run_dir: Path, text: bytes | None) -> str | None:
    """Start on a folder whose lock file nobody holds; what went wrong, if anything."""
    if text is not None:
        RunLayout(run_dir).lock.write_bytes(text)
    (ended,) = start_at_once(command, 1)
    if ended["exit_code"] != 0:
        return " ".join(ended["told"]) or f"exit code {ended['exit_code']}"
    if read_holder(RunLayout(run_dir).lock) is None:
        return "nobody holds the lock"
    end_run(run_dir)
    return None


def list_stale_locks() -> dict[str, bytes | None]:
    """What a lock file may hold that nobody holds; None is what the killed run has left."""
    alive = {"pid": os.getpid(), "host": os.uname().nodename, "process_start_time": 1.0}
    return {
        "left by SIGKILL": None,
        "empty": b"",
        "garbled": b"\xff\x00{",
        "of a process that lives and is another": json.dumps(alive).encode(),
    }


# ------------------------------------------------------------------------------------------------------------- program


def run_benchmark(options: Namespace) -> dict[str, Any]:
    work = options.work.resolve()
    run_dir = work / "run"
    if run_dir.exists() and read_holder(RunLayout(run_dir).lock) is not None:
        raise BenchmarkError(f"{run_dir} is in use: stop it with cvm-translator stop {run_dir}")
    shutil.rmtree(work, ignore_errors=True)
    config = write_config(work)
    command = [*common.PROGRAM, "start", str(config), "--output-dir", str(run_dir)]
    failures: dict[str, list[str]] = {ONE: [], TOLD: [], LIGHT: [], STALE: []}
    try:
        ended = start_at_once(command, options.starts)
        winners = [start for start in ended if start["exit_code"] == 0]
        if len(winners) != 1 or read_holder(RunLayout(run_dir).lock) is None:
            failures[ONE].append(f"{len(winners)} won, the lock is {read_holder(RunLayout(run_dir).lock)}")
        for start in ended:
            is_told = start["exit_code"] == 1 and len(start["told"]) == 1 and MESSAGE.fullmatch(start["told"][0])
            if start["exit_code"] != 0 and not is_told:
                failures[TOLD].append(f"exit code {start['exit_code']}: {' / '.join(start['told'])[:300]}")
        logs = sorted(RunLayout(run_dir).logs.glob("*.log"))
        log = "\n".join(path.read_text(encoding="utf-8", errors="replace") for path in logs)
        num_imports = len(IMPORTED_TORCH.findall(log)) + sum(start["imports_torch"] for start in ended)
        if num_imports > 1:
            failures[LIGHT].append(f"{num_imports} processes")
        end_run(run_dir)
        for kind, text in list_stale_locks().items():
            wrong = start_with_stale_lock(command, run_dir, text)
            if wrong is not None:
                failures[STALE].append(f"{kind}: {wrong}")
    finally:
        if run_dir.exists() and read_holder(RunLayout(run_dir).lock) is not None:
            end_run(run_dir)
    losers = [start for start in ended if start["exit_code"] != 0]
    return {
        "num_starts": options.starts,
        "num_winners": len(winners),
        "num_imports_of_torch": num_imports,
        "messages": sorted({line for start in losers for line in start["told"]})[:5],
        "slowest_seconds": max(start["seconds"] for start in ended),
        "stale_locks": list(list_stale_locks()),
        "num_cores": os.cpu_count(),
        "failures": failures,
    }


def format_results(data: Mapping[str, Any]) -> str:
    """The checks and the figures as Markdown."""
    lines = [f"# {data['num_starts']} starts at once on one run folder", ""]
    lines += [*evidence.describe_checks(data["failures"]), ""]
    lines += [
        f"{data['num_winners']} won; {data['num_imports_of_torch']} processes imported torch; all had ended within"
        f" {data['slowest_seconds']:.0f} s on {data['num_cores']} cores. The others were told, for example:",
        "",
        *(f"    {message}" for message in data["messages"][:1]),
        "",
        f"Locks nobody holds, on each of which the next start won: {', '.join(data['stale_locks'])}.",
    ]
    return "\n".join(lines)


def build_parser() -> argparse.ArgumentParser:
    parser = common.build_plain_parser("Start one run many times at once.")
    parser.add_argument("--starts", type=int, default=100, metavar="N")
    parser.add_argument("--work", type=Path, default=common.RESULTS / "work" / NAME)
    return parser


def main() -> int:
    options = build_parser().parse_args()
    data = run_benchmark(options)
    return evidence.conclude(options.results, NAME, data, format_results(data))


if __name__ == "__main__":
    if sys.platform != "linux":
        sys.exit("error: this benchmark reads /proc: run it on Linux")
    common.run_main(main)
