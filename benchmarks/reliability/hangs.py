"""Trainers that hang in a step: how soon does the supervisor see it, and does the run go on?

A real run trains under a real supervisor; then its trainer is stopped (SIGSTOP) at a random moment of a step, which no
handler hears. Most trials use a supervisor whose floor of 60 seconds is so low that the rule of twice the slowest step
decides; some use the product's own settings. Checked are, each time:

- the hang is seen within twice the slowest step (or the floor, where that is more), as far as a supervisor can tell
  that looks once a tick: each step may seem a tick longer, and two pass until the hang is told;
- no trainer that was not stopped is taken for hung;
- the trainer is ended and started again, and resumes exactly from its newest checkpoint;
- every step has one loss, however often it was computed.

    python -m benchmarks.reliability.hangs

It begins anew each time. The program ends with 1 if a check fails.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import sys
import time
from argparse import Namespace
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from benchmarks import common, evidence
from benchmarks.common import Arm, BenchmarkError
from benchmarks.reliability import tiny_run
from benchmarks.reliability.supervised import TIMEOUT_SECONDS, Event, SupervisedRun
from cvm_translator.daemon.pulse import Patience
from cvm_translator.daemon.supervisor import Rules, Supervisor
from cvm_translator.runs.layout import RunLayout

NAME = "hangs"
# Steps of some tenths of a second, a checkpoint at every second of them, and no validation.
CHANGES: dict[str, Any] = {
    "teacher": {
        "model": {"dim": 128, "feed_forward_dim": 512},
        "training": {"batch_size": 256, "num_iterations": 10_000, "validate_every_steps": 10_000}
        | {"checkpoint_every_steps": 2},
    }
}
# A window of no length forgets every restart at once: the delay does not grow, and nothing is given up.
IMPATIENT = Rules(
    window_seconds=0.0,
    first_delay_seconds=0.1,
    grace_seconds=1.0,
    tick_seconds=0.1,
    patience=Patience(step=0.3, save=5.0),
)
NUM_STEPS = 4
"""Trained by each trainer before it is stopped."""
SEEN = "no sign of the trainer for"

SOON = "a hang is seen within twice the slowest step (or the floor), to the supervisor's ticks"
TRUE = "no trainer that was not stopped is taken for hung"
AGAIN = "the trainer is started again, and resumes exactly from its newest checkpoint"
SAME = "every step has one loss"


class Trials:
    """One run whose trainer is stopped again and again."""

    def __init__(self, arm: Arm, rules: Rules, command: list[str] | None, generator: random.Random) -> None:
        self.rules, self.random = rules, generator
        self.run = SupervisedRun(arm, command)
        self.trials: list[dict[str, float]] = []
        self.failures: dict[str, list[str]] = {SOON: [], TRUE: [], AGAIN: [], SAME: []}

    def num_seen(self) -> int:
        return self.run.log.read_text(encoding="utf-8", errors="replace").count(SEEN)

    def hang_once(self) -> None:
        """Let the trainer train, stop it, wait until that is seen and until the next one has resumed."""
        run, num_seen, first = self.run, self.num_seen(), len(self.run.events)
        for _ in range(NUM_STEPS):
            run.wait_for(lambda event: event["kind"] == "checkpoint")
        time.sleep(self.random.uniform(0.0, 0.25))
        trainer, start = run.trainer, time.monotonic()
        os.kill(trainer, signal.SIGSTOP)
        while self.num_seen() == num_seen:
            if time.monotonic() - start > TIMEOUT_SECONDS:
                os.kill(trainer, signal.SIGKILL)
                raise BenchmarkError(f"nobody saw the hang: see {run.log}")
            time.sleep(0.01)
        seconds = time.monotonic() - start
        run.follow()
        slowest = find_slowest_step(run.events[first:])
        patience = self.rules.patience
        tick = self.rules.tick_seconds
        limit = max(patience.step, patience.step_factor * (slowest + tick)) + 2 * tick
        what = f"hang {len(self.trials) + 1}"
        if seconds > limit:
            self.failures[SOON].append(f"{what}: {seconds:.2f} s, at most {limit:.2f} s")
        newest = run.find("checkpoint")[-1]
        resumed = run.wait_for(lambda event: event["kind"] == "resumed")
        if not resumed["exact"] or resumed["step"] < newest["step"]:
            self.failures[AGAIN].append(f"{what}: {resumed['step']}, saved {newest['step']}, {resumed['differences']}")
        self.trials.append({"seen_seconds": seconds, "slowest_step_seconds": slowest, "limit_seconds": limit})
        print(f"{what}: seen after {seconds:.2f} s, slowest step {slowest:.2f} s", flush=True)

    def run_all(self, num_trials: int) -> dict[str, Any]:
        with self.run as run:
            for _ in range(num_trials):
                self.hang_once()
        restarts = run.find("warning", "restart")
        if len(restarts) != num_trials or not all("hung" in event["reason"] for event in restarts):
            self.failures[TRUE] += [event["reason"] for event in restarts] or ["no restart"]
        losses: dict[int, set[float]] = {}
        for event in run.find("train"):
            losses.setdefault(event["step"], set()).add(event["loss"])
        self.failures[SAME] += [f"step {step}: {found}" for step, found in losses.items() if len(found) > 1]
        return {"trials": self.trials, "num_steps": len(losses), "reasons": [event["reason"] for event in restarts]}


def find_slowest_step(events: list[Event]) -> float:
    """Seconds from whatever a trainer did before a step to the step's end."""
    times = [datetime.fromisoformat(event["time"]).timestamp() for event in events]
    steps = [number for number, event in enumerate(events) if event["kind"] == "train" and number]
    return max(times[number] - times[number - 1] for number in steps)


def supervise_impatiently(config: Path, run_dir: Path) -> int:
    """A supervisor of the product with `IMPATIENT`, in this process."""
    quiet = ["--output-dir", str(run_dir), "--no-progress"]
    first = [*common.PROGRAM, "run", str(config), *quiet]
    again = [*common.PROGRAM, "resume", str(run_dir), "--foreground", "--no-progress"]
    return Supervisor(RunLayout(run_dir), first, again, rules=IMPATIENT).run()


def run_benchmark(options: Namespace) -> dict[str, Any]:
    work = options.work.resolve()
    shutil.rmtree(work, ignore_errors=True)
    config, generator = tiny_run.write_config(work, **CHANGES), random.Random(options.seed)
    impatient = tiny_run.build_arm(work, "impatient", config)
    module = [sys.executable, "-m", "benchmarks.reliability.hangs"]
    command = [*module, "--supervise", str(config), str(impatient.folder)]
    failures: dict[str, list[str]] = {}
    results = {}
    groups = {
        "impatient": (options.hangs, impatient, IMPATIENT, command),
        "default": (options.default_hangs, tiny_run.build_arm(work, "default", config), Rules(), None),
    }
    for name, (num_trials, arm, rules, own_command) in groups.items():
        if num_trials:
            trials = Trials(arm, rules, own_command, generator)
            results[name] = trials.run_all(num_trials) | {"floor_seconds": rules.patience.step}
            for check, found in trials.failures.items():
                failures.setdefault(check, []).extend(f"{name}, {text}" for text in found)
    return {"seed": options.seed, "groups": results, "failures": failures}


def format_results(data: Mapping[str, Any]) -> str:
    """The checks and the table as Markdown."""
    lines = ["# Trainers that hang in a step", "", *evidence.describe_checks(data["failures"]), ""]
    rows = []
    for name, group in data["groups"].items():
        trials = group["trials"]
        seen = sorted(trial["seen_seconds"] for trial in trials)
        slowest = [trial["slowest_step_seconds"] for trial in trials]
        rows.append(
            [
                "the product's own" if name == "default" else "a low floor",
                f"{group['floor_seconds']:g}",
                len(trials),
                f"{min(slowest):.2f} to {max(slowest):.2f}",
                f"{seen[0]:.2f} to {seen[-1]:.2f}",
            ]
        )
    header = ["supervisor's settings", "floor, s", "hangs", "slowest step before, s", "seen after, s"]
    return "\n".join([*lines, evidence.markdown_table(header, rows)])


def build_parser() -> argparse.ArgumentParser:
    parser = common.build_plain_parser("Stop the trainers of a supervised run in the middle of a step.")
    parser.add_argument("--hangs", type=int, default=10, metavar="N", help="under a supervisor with a low floor")
    parser.add_argument("--default-hangs", type=int, default=1, metavar="N", help="under the product's own settings")
    parser.add_argument("--seed", type=int, default=13, help="draws the moments")
    parser.add_argument("--work", type=Path, default=common.RESULTS / "work" / NAME)
    parser.add_argument("--supervise", nargs=2, type=Path, help=argparse.SUPPRESS)
    return parser


def main() -> int:
    options = build_parser().parse_args()
    if options.supervise:
        return supervise_impatiently(*options.supervise)
    data = run_benchmark(options)
    return evidence.conclude(options.results, NAME, data, format_results(data))


if __name__ == "__main__":
    common.run_main(main)
