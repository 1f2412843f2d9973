"""Is a run that is killed again and again the same run? `start`, then `kill -9` and `resume`, N times, at random times.

Checked against an uninterrupted run of the same config: the loss of every executed step in the events, as many times as
it was computed, bit for bit; no step missing; and the teacher's and the student's weights byte for byte. Both stages
that train are hit, as are the moments in which a run loads, validates, saves, quantises and judges.

    python -m benchmarks.reliability.kill_resume

The uninterrupted run is kept and reused; the killed one begins anew. The program ends with 1 if a check fails.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from argparse import Namespace
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks import common, evidence
from benchmarks.common import Arm, BenchmarkError
from cvm_translator.runs import atomic
from cvm_translator.runs.events import EventTail, read_events
from cvm_translator.runs.lock import read_holder

NAME = "kill_resume"
SMALL_CONFIG = Path(__file__).with_name("small.yaml")
FEW_STEPS = (
    "corpus.validation_size=100",
    "corpus.test_size=100",
    "teacher.training.num_iterations=1000",  # fewer, and the teacher is too poor to be a measure of the student
    "teacher.training.min_learning_rate_ratio=0.5",
    "teacher.training.validate_every_steps=250",
    "teacher.training.checkpoint_every_steps=25",
    "distillation.num_iterations=300",
    "distillation.checkpoint_every_steps=25",
    "validation.every_steps=100",
)
WEIGHTS = ("teacher/model", "student/float", "student/int8")
EARLY_SHARE = 0.2
"""Of the kills that come at once after a start, while the run still loads."""
EARLY_SECONDS = 5.0
JITTER_SECONDS = 2.0
"""Kills come up to so long after the step they wait for was seen."""
TIMEOUT_SECONDS = 600.0
_POLL_SECONDS = 0.02


@dataclass(frozen=True)
class Kill:
    """One kill: what the events had told of the run by then."""

    at: str
    seconds_after_start: float


# --------------------------------------------------------------------------------------------------------- the killing


class KilledRun:
    """Starts and resumes one run through the command line, follows its events, and kills it."""

    def __init__(self, arm: Arm) -> None:
        self.arm = arm
        self.tail = EventTail(arm.layout.events)
        self.position = "nothing"
        self.progress = 0.0
        """Training steps seen, the teacher's included; the stages after training count on from the last of them."""
        config = arm.load_config()
        self.num_teacher_steps = config.teacher.training.num_iterations
        self.num_steps = self.num_teacher_steps + config.distillation.num_iterations

    def launch(self) -> int:
        """Start the run, or resume it once it is there; its process id."""
        is_new = not self.arm.layout.config.exists()
        command = self.arm.command("start") if is_new else [*common.PROGRAM, "resume", str(self.arm.folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        match = re.search(r"process id: (\d+)", done.stdout)
        if done.returncode != 0 or match is None:
            raise BenchmarkError(
                f"{' '.join(command[2:4])} ended with exit code {done.returncode}: {done.stderr.strip()}"
            )
        return int(match[1])

    def is_running(self) -> bool:
        return read_holder(self.arm.layout.lock) is not None

    def follow(self) -> None:
        """Take in the new events."""
        for event in self.tail.poll():
            if event["kind"] == "train":
                before = self.num_teacher_steps if event["stage"] == "distil" else 0
                self.progress = max(self.progress, before + event["step"])
                self.position = f"{event['stage']} step {event['step']}"
            elif event["kind"] == "stage_started":
                self.position = f"stage {event['stage']}"
                if event["stage"] in ("quantise", "gate"):
                    self.progress = max(self.progress, self.num_steps + 1)

    def wait_for(self, progress: float) -> None:
        """Follow until the run has come so far; raises if it ends before."""
        deadline, seen = time.monotonic() + TIMEOUT_SECONDS, self.position
        while self.progress < progress:
            is_running = self.is_running()
            self.follow()
            if self.position != seen:
                deadline, seen = time.monotonic() + TIMEOUT_SECONDS, self.position
            if self.progress < progress and (not is_running or time.monotonic() > deadline):
                how = "ended" if not is_running else f"made no progress for {TIMEOUT_SECONDS:.0f} s"
                raise BenchmarkError(f"the killed run {how} at {self.position}: see {self.arm.layout.logs}")
            time.sleep(_POLL_SECONDS)

    def kill(self, pid: int) -> None:
        """SIGKILL the supervisor, which would start another trainer, and the trainer; wait until the lock is free."""
        supervisor, holder = read_holder(self.arm.layout.supervisor_lock), read_holder(self.arm.layout.lock)
        if holder is None or supervisor is None or supervisor.get("pid") != pid:
            raise BenchmarkError(f"process {pid} no longer keeps {self.arm.folder}: see {self.arm.layout.logs}")
        os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(holder["pid"]), signal.SIGKILL)
        while self.is_running():
            time.sleep(_POLL_SECONDS)
        self.follow()


def kill_and_resume(run: KilledRun, num_kills: int, seed: int) -> list[Kill]:
    """Kill `num_kills` times and let the run end; most wait for a random step of a stage, the last for the gate."""
    generator = random.Random(seed)
    num_early = int(EARLY_SHARE * num_kills)
    bounds = [(0, run.num_teacher_steps), (run.num_teacher_steps, run.num_steps)]
    targets = [generator.uniform(*bounds[number % 2]) for number in range(num_kills - num_early - 1)]
    moments: list[float | None] = [*sorted(targets), float(run.num_steps + 1)]
    for _ in range(num_early):
        moments.insert(generator.randrange(len(moments)), None)
    kills = []
    for number, moment in enumerate(moments, start=1):
        pid, start = run.launch(), time.monotonic()
        if moment is not None:
            run.wait_for(moment)
        time.sleep(generator.uniform(0.0, EARLY_SECONDS if moment is None else JITTER_SECONDS))
        run.kill(pid)
        kills.append(Kill(run.position, time.monotonic() - start))
        print(
            f"kill {number} of {num_kills} at {run.position}, {kills[-1].seconds_after_start:.1f} s after", flush=True
        )
    run.launch()
    while run.is_running():
        time.sleep(_POLL_SECONDS)
    if not run.arm.is_done():
        raise BenchmarkError(f"the last resume did not end well: see {run.arm.layout.logs}")
    return kills


# ---------------------------------------------------------------------------------------------------------- comparison


def read_losses(arm: Arm) -> dict[tuple[str, int, int, int], list[Any]]:
    """Every loss in the events by (stage, step, attempt, executed step); those replayed after a kill have several.

    A step whose batch was skipped is executed once more, with another batch.
    """
    losses: dict[tuple[str, int, int, int], list[Any]] = {}
    for event in read_events(arm.layout.events):
        if event["kind"] == "train":
            key = (event["stage"], event["step"], event["attempt"], event["executed_step"])
            losses.setdefault(key, []).append(event["loss"])
    return losses


def compare_runs(expected: Arm, killed: Arm) -> dict[str, Any]:
    """Steps, replays, and everything that differs."""
    reference, losses = read_losses(expected), read_losses(killed)
    different = [key for key in losses if any(loss != reference.get(key, [None])[0] for loss in losses[key])]
    stages = Counter(stage for stage, *_ in losses)
    return {
        "num_steps": dict(stages),
        "num_losses": {stage: sum(len(losses[key]) for key in losses if key[0] == stage) for stage in stages},
        "different_steps": [list(key) for key in sorted(different)],
        "missing_steps": [list(key) for key in sorted(reference.keys() - losses.keys())],
        "weights": {name: _hash_weights(expected, name) == _hash_weights(killed, name) for name in WEIGHTS},
    }


def _hash_weights(arm: Arm, name: str) -> str:
    return atomic.sha256_file(arm.folder / name / "model.safetensors")


def find_failures(compared: Mapping[str, Any]) -> dict[str, list[str]]:
    """What each check found wrong; a check that holds has an empty list."""
    return {
        "every loss equals the uninterrupted run's, bit for bit": [str(key) for key in compared["different_steps"]],
        "no step is missing in the events": [str(key) for key in compared["missing_steps"]],
        "all weights are equal, byte for byte": [
            name for name, is_equal in compared["weights"].items() if not is_equal
        ],
    }


def format_results(data: Mapping[str, Any]) -> str:
    """The checks and the tables as Markdown."""
    lines = [f"# Kill and resume: {evidence.describe_config(data)}", ""]
    lines += [f"{len(data['kills'])} times `kill -9` and `resume`, compared with an uninterrupted run:", ""]
    lines += evidence.describe_checks(data["failures"])
    compared = data["compared"]
    wrong = [stage for stage, *_ in (*compared["different_steps"], *compared["missing_steps"])]
    rows: list[list[object]] = [
        [stage, count, compared["num_losses"][stage] - count, wrong.count(stage)]
        for stage, count in compared["num_steps"].items()
    ]
    lines += ["", evidence.markdown_table(["stage", "steps", "replayed", "different or missing"], rows), ""]
    rows = [[number, kill["at"], f"{kill['seconds_after_start']:.1f}"] for number, kill in enumerate(data["kills"], 1)]
    return "\n".join([*lines, evidence.markdown_table(["kill", "last seen at", "seconds after (re)start"], rows)])


# ------------------------------------------------------------------------------------------------------------- program


def run_benchmark(options: Namespace) -> dict[str, Any]:
    work = options.work.resolve()
    settings = (*FEW_STEPS, f"num_threads={options.threads_per_arm}", *options.set)
    expected = Arm("uninterrupted", options.config.resolve(), settings, work / "uninterrupted")
    killed = Arm("killed", options.config.resolve(), settings, work / "killed")
    common.run_arms([expected], 1, options.threads_per_arm)
    if killed.folder.exists():
        if read_holder(killed.layout.lock) is not None:
            raise BenchmarkError(f"{killed.folder} is in use: stop it with cvm-translator stop {killed.folder}")
        shutil.rmtree(killed.folder)
    os.environ["OMP_NUM_THREADS"] = str(options.threads_per_arm)
    run = KilledRun(killed)
    try:
        kills = kill_and_resume(run, options.num_kills, options.kill_seed)
    finally:
        if run.is_running():
            subprocess.run([*common.PROGRAM, "stop", str(killed.folder)], check=False, stdout=sys.stderr)
    compared = compare_runs(expected, killed)
    return {
        "config": options.config.name,
        "settings": list(options.set),
        "kill_seed": options.kill_seed,
        "kills": [asdict(kill) for kill in kills],
        "compared": compared,
        "failures": find_failures(compared),
    }


def main() -> int:
    parser = common.build_parser(
        "Kill a run at random moments, resume it, and compare it with one that was left alone.",
        SMALL_CONFIG,
        common.RESULTS / "work" / NAME,
    )
    parser.add_argument("--num-kills", type=int, default=20, metavar="N")
    parser.add_argument("--kill-seed", type=int, default=13, help="draws the moments")
    options = parser.parse_args()
    if options.num_kills < 1:
        raise BenchmarkError(f"--num-kills {options.num_kills}: give at least 1")
    data = run_benchmark(options)
    return evidence.conclude(options.results, NAME, data, format_results(data))


if __name__ == "__main__":
    common.run_main(main)
