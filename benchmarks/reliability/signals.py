"""SIGTERM and SIGINT at random moments of real small runs: is everything saved, and is the run still the same run?

Rounds: one run after the other is stopped and resumed until it ends by itself, then compared with one that was left
alone. Most signals go to the run itself, some to the supervisor of a supervised one (`start --foreground`); now and
then a second signal follows the first at once. Signals alternate. Checked are:

- after one signal the process ends with 143 (SIGTERM) or 130 (SIGINT) within 30 seconds;
- after it the newest checkpoint is that of the last step, unless nothing has been trained yet;
- each resume is exact, from that very checkpoint;
- after a second signal the process is gone within 2 seconds, with the same codes;
- after each round every loss and all weights are those of the run that was left alone (see `kill_resume`).

    python -m benchmarks.reliability.signals

It begins anew each time. The program ends with 1 if a check fails.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import subprocess
import time
from argparse import Namespace
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks import common, evidence
from benchmarks.common import Arm, BenchmarkError
from benchmarks.reliability import tiny_run
from benchmarks.reliability.forked import Forge
from benchmarks.reliability.kill_resume import compare_runs, find_failures
from cvm_translator.checkpoints.folder import verify_checkpoint
from cvm_translator.checkpoints.store import CheckpointStore
from cvm_translator.errors import CheckpointError
from cvm_translator.runs.events import EventTail

NAME = "signals"
SIGNALS = (signal.SIGTERM, signal.SIGINT)
MAX_SECONDS = 30.0
MAX_SECONDS_SECOND = 2.0
MAX_SECONDS_ALIVE = 2.0
"""A signal comes within so long after the run has begun."""
PAUSE_SECONDS = (0.005, 0.03)
"""Between a signal and the second one: so little that the first is hardly obeyed yet, enough that it has arrived."""
TIMEOUT_SECONDS = 600.0

LEFT = f"after one signal the process ends with 143 or 130 within {MAX_SECONDS:.0f} s"
SAVED = "after it the newest checkpoint is that of the last step"
RESUMED = "each resume is exact, from the checkpoint that the stop has left"
AT_ONCE = f"after a second signal the process is gone within {MAX_SECONDS_SECOND:.0f} s, with the same codes"
STUDENT_STAGE = "distil"
"""Once half of the signals have come elsewhere, the others wait for this stage."""

ALONE, SUPERVISED, TWICE = "the run itself", "its supervisor", "the run itself, twice"


class Forked:
    """A run in a forked process, seen as `subprocess.Popen` shows one."""

    def __init__(self, process: Any) -> None:
        self.process = process
        self.pid: int = process.pid

    def poll(self) -> int | None:
        code: int | None = self.process.exitcode
        return code

    def wait(self, timeout: float) -> int:
        self.process.join(timeout)
        if self.process.exitcode is None:
            raise subprocess.TimeoutExpired("run", timeout)
        return int(self.process.exitcode)


class SignalledRun:
    """Launches one run again and again, follows its events, and looks at what a signal has left."""

    def __init__(self, arm: Arm, forge: Forge) -> None:
        self.arm, self.forge = arm, forge
        self.tail = EventTail(arm.layout.events)
        self.num_starts = 0
        self.position = "nothing"
        self.stage: str | None = None
        """The stage whose loop has trained last, if it is not finished."""
        self.last_step = (1, 0)
        """Attempt and step of the last optimizer step."""
        self.saved_at: tuple[int, int] | None = None
        """The checkpoint that the last stop has left in a stage."""
        self.num_stopped = 0
        self.wrong_resumes: list[str] = []

    def launch(self, kind: str) -> Forked | subprocess.Popen[bytes]:
        """Start or resume it, and wait until it has begun."""
        log, before = self.arm.layout.logs / "benchmark.log", self.num_starts
        process: Forked | subprocess.Popen[bytes]
        if kind == SUPERVISED:
            log.parent.mkdir(parents=True, exist_ok=True)
            with open(log, "ab") as stream:
                command = [*self.arm.command("start"), "--foreground", "--no-progress"]
                process = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=stream, stderr=stream, start_new_session=True
                )
        else:
            resume = ["resume", str(self.arm.folder), "--foreground"]
            first = self.arm.command()[len(common.PROGRAM) :]
            arguments = resume if self.arm.layout.config.exists() else first
            process = Forked(self.forge.launch([*arguments, "--no-progress"], log))
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while self.num_starts == before:
            if process.poll() is not None or time.monotonic() > deadline:
                raise BenchmarkError(f"the run did not begin (exit code {process.poll()}): see {log}")
            time.sleep(0.005)
            self.follow()
        return process

    def follow(self) -> None:
        """Take in the new events."""
        for event in self.tail.poll():
            kind, stage = event["kind"], event.get("stage")
            if kind == "run_started":
                self.num_starts += 1
            elif kind == "stage_started":
                self.position = str(stage)
            elif kind == "stage_finished" and stage == self.stage:
                self.stage = self.saved_at = None
            elif kind == "train":
                self.position = self.stage = str(stage)
                if not event["skipped"]:
                    self.last_step = (event["attempt"], event["step"])
            elif kind == "rollback":
                self.last_step = (event["attempt"] + 1, event["to_step"])
            elif kind == "stopped":
                self.num_stopped += 1
            elif kind == "resumed":
                place = (event["attempt"], event["step"])
                if not event["exact"] or (self.saved_at is not None and place != self.saved_at):
                    self.wrong_resumes.append(f"{stage}: {place}, saved was {self.saved_at}, exact {event['exact']}")
                self.last_step = place

    def await_stage(self, name: str, process: Forked | subprocess.Popen[bytes]) -> None:
        """Wait until the stage has trained, or the process is gone; BenchmarkError if neither comes."""
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while self.position != name and process.poll() is None:
            if time.monotonic() > deadline:
                raise BenchmarkError(f"{name} was not reached: see {self.arm.layout.logs}")
            time.sleep(0.005)
            self.follow()

    def find_unsaved(self) -> str | None:
        """What is wrong with the newest checkpoint of the stage that was training, if anything."""
        self.saved_at = None
        if self.stage is None:
            return None
        layout = self.arm.layout
        folder = layout.teacher / "checkpoints" if self.stage == "teacher" else layout.checkpoints
        names = CheckpointStore(folder, report=print).names()
        try:
            newest = verify_checkpoint(folder / names[0])
        except (CheckpointError, IndexError) as error:
            return f"{self.stage}: {error or 'no checkpoint'}"
        self.saved_at = (newest.attempt, newest.step)
        return None if self.saved_at == self.last_step else f"{self.stage}: {self.saved_at}, trained {self.last_step}"


class Trials:
    """The signals so far, and what was wrong with them."""

    def __init__(self, options: Namespace) -> None:
        kinds = [ALONE] * (options.signals - options.supervised) + [SUPERVISED] * options.supervised
        self.left = kinds + [TWICE] * options.second
        """The signals still to be sent."""
        self.random = random.Random(options.seed)
        self.random.shuffle(self.left)
        self.done: list[dict[str, Any]] = []
        self.failures: dict[str, list[str]] = {LEFT: [], SAVED: [], RESUMED: [], AT_ONCE: []}

    def signal_once(self, run: SignalledRun) -> None:
        """Launch, wait, signal, look; nothing is counted where the run ended by itself before."""
        kind, number = self.left[-1], SIGNALS[len(self.left) % 2]
        process = run.launch(kind)
        if 2 * sum(trial["at"] != STUDENT_STAGE for trial in self.done) > len(self.done) + len(self.left):
            run.await_stage(STUDENT_STAGE, process)
        time.sleep(self.random.uniform(0.0, MAX_SECONDS_ALIVE))
        run.follow()
        num_stopped = run.num_stopped
        if process.poll() is not None:
            return
        start = time.monotonic()
        os.kill(process.pid, number)
        if kind == TWICE:
            time.sleep(self.random.uniform(*PAUSE_SECONDS))
            if process.poll() is None:
                os.kill(process.pid, number)
        code = process.wait(TIMEOUT_SECONDS)
        seconds = time.monotonic() - start
        run.follow()
        if run.arm.is_done() and code in (0, 5, -number):
            return  # it ended by itself while the signal was on its way
        self.left.pop()
        what = f"signal {len(self.done) + 1} ({number.name} to {kind}, in {run.position})"
        check, limit = (AT_ONCE, MAX_SECONDS_SECOND) if kind == TWICE else (LEFT, MAX_SECONDS)
        if code != 128 + number or seconds > limit:
            self.failures[check].append(f"{what}: exit code {code} after {seconds:.1f} s")
        said = run.num_stopped > num_stopped
        unsaved = run.find_unsaved()
        if kind != TWICE and (unsaved is not None or not said):
            self.failures[SAVED].append(f"{what}: {unsaved or 'no stopped event'}")
        self.done.append({"kind": kind, "signal": number.name, "at": run.position, "seconds": seconds, "said": said})
        print(f"{what}: {seconds:.2f} s", flush=True)

    def run_round(self, arm: Arm, forge: Forge) -> None:
        """Signal one run until it ends, or until there were signals enough; then let it end."""
        run = SignalledRun(arm, forge)
        try:
            while not arm.is_done():
                if self.left:
                    self.signal_once(run)
                    continue
                run.launch(ALONE).wait(TIMEOUT_SECONDS)
                if not arm.is_done():
                    raise BenchmarkError(f"{arm.folder} did not end well: see {arm.layout.logs}")
            run.follow()
        finally:
            run.tail.close()
        self.failures[RESUMED] += run.wrong_resumes


def run_benchmark(options: Namespace) -> dict[str, Any]:
    work = options.work.resolve()
    shutil.rmtree(work, ignore_errors=True)
    config = tiny_run.write_config(work)
    expected = tiny_run.build_arm(work, "uninterrupted", config)
    common.run_arms([expected], 1, 1)
    os.environ["OMP_NUM_THREADS"] = "1"
    forge, trials, rounds = Forge(), Trials(options), []
    while trials.left:
        arm = tiny_run.build_arm(work, "signalled", config)
        trials.run_round(arm, forge)
        compared = compare_runs(expected, arm)
        rounds.append(compared)
        for check, found in find_failures(compared).items():
            trials.failures.setdefault(check, []).extend(f"round {len(rounds)}: {item}" for item in found)
        shutil.rmtree(arm.folder)
    return {
        "signals": trials.done,
        "seed": options.seed,
        "num_rounds": len(rounds),
        "num_steps": rounds[0]["num_steps"],
        "failures": trials.failures,
    }


def format_results(data: Mapping[str, Any]) -> str:
    """The checks and the table as Markdown."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for trial in data["signals"]:
        groups.setdefault((trial["signal"], trial["kind"]), []).append(trial)
    places = Counter(trial["at"] for trial in data["signals"])
    lines = [
        f"# {len(data['signals'])} signals to {data['num_rounds']} small runs",
        "",
        *evidence.describe_checks(data["failures"]),
        "",
        "They came in " + ", ".join(f"{name} {count}" for name, count in places.most_common()) + ".",
        "",
    ]
    rows = [
        [name, kind, len(trials), f"{max(t['seconds'] for t in trials):.2f}", sum(t["said"] for t in trials)]
        for (name, kind), trials in sorted(groups.items())
    ]
    header = ["signal", "sent to", "times", "slowest end, seconds", "saved and said so"]
    return "\n".join([*lines, evidence.markdown_table(header, rows)])


def build_parser() -> argparse.ArgumentParser:
    parser = common.build_plain_parser("Signal small runs at random moments and resume them.")
    parser.add_argument("--signals", type=int, default=100, metavar="N", help="single ones")
    parser.add_argument("--supervised", type=int, default=10, metavar="N", help="of these, to a supervisor")
    parser.add_argument("--second", type=int, default=10, metavar="N", help="signals that are followed by another")
    parser.add_argument("--seed", type=int, default=13, help="draws the moments")
    parser.add_argument("--work", type=Path, default=common.RESULTS / "work" / NAME)
    return parser


def main() -> int:
    options = build_parser().parse_args()
    if not 0 <= options.supervised <= options.signals:
        raise BenchmarkError(f"--supervised {options.supervised}: give 0 to --signals")
    data = run_benchmark(options)
    return evidence.conclude(options.results, NAME, data, format_results(data))


if __name__ == "__main__":
    common.run_main(main)
