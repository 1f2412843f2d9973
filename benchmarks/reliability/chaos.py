"""Hundreds of SIGKILLs over whole small real runs, many of them inside a save: is anything lost, is any bit different?

Rounds: one run after the other is killed again and again until it ends by itself, then compared with one that was left
alone. Each launch goes on from the last checkpoint, and the next kill comes some tens of steps later, so that the kills
of a round lie all along it: best checkpoints, planted faults with their rollbacks, the start of quantised training, and
the stages after training. What is aimed at (see `AIMS`) is drawn; where a kill fell is told by what it left on disk. It
counts as *inside a save* only if there is a temporary folder or link of the checkpoint store that no finished save
leaves behind. Checked are:

- after each kill: every checkpoint verifies byte for byte, as many as are to be kept are there, and `latest` and
  `best_model` point to those that were told of last, or newer ones;
- after each restart: the run resumed from the newest checkpoint that was told of or a newer one, and says it is exact;
- after each process that ended by itself: it ended well;
- after each round: every loss and all weights are those of the run that was left alone (see `kill_resume`);
- at the end: enough kills fell where it matters (see `MINIMA`).

    python -m benchmarks.reliability.chaos --kills 200

Kills are counted over all calls with the same --work: one that is interrupted carries on. All runs share one trained
teacher, so that it is the student's training that is hit. The program ends with 1 if a check fails.
"""

from __future__ import annotations

import os
import random
import shutil
import statistics
import time
from argparse import Namespace
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks import common, evidence
from benchmarks.common import Arm, BenchmarkError
from benchmarks.reliability.chaos_run import (
    BEST_SAVE,
    LATE_STAGES,
    LOADING,
    PHASES,
    ROLLBACK,
    SAVE,
    TRAINING,
    VALIDATION,
    KilledRun,
    Position,
)
from benchmarks.reliability.kill_resume import compare_runs, find_failures
from cvm_translator.errors import EXIT_GATE_FAILED, EXIT_OK
from cvm_translator.runs import atomic
from cvm_translator.runs.events import read_events

NAME = "chaos"
SMALL_CONFIG = Path(__file__).with_name("small.yaml")
FEW_STEPS = (
    "corpus.validation_size=300",
    "corpus.test_size=300",
    "teacher.training.num_iterations=1000",
    "teacher.training.min_learning_rate_ratio=0.5",
    "distillation.num_iterations=600",
    "distillation.checkpoint_every_steps=10",
    "validation.every_steps=25",
    # Rolled back by validations and by the batches themselves.
    "fault_injection=[{kind: weight_noise, from_step: 210, num_steps: 1, factor: 1},"
    " {kind: nan_loss, from_step: 460, num_steps: 3}]",
)
AIMS: dict[str, tuple[float, str, Callable[[KilledRun], bool]]] = {
    "loading": (0.05, LOADING, lambda run: True),
    "training": (0.09, TRAINING, lambda run: True),
    "save": (0.42, SAVE, lambda run: bool(run.find_traces())),
    "save after a validation": (0.26, SAVE, lambda run: run.position.verdict is not None and bool(run.find_traces())),
    "validation": (0.18, VALIDATION, lambda run: run.position.is_validating),
}
"""Share of the kills, the phase that is meant, and what is waited for: a kill comes within the time that the phase
takes from then, and may miss it. A rollback and the stages after training are aimed at as the run comes to them."""
MAX_STEPS_AHEAD = 40
"""The aim is taken so many steps at most after those that a launch resumed at."""
ROLLBACK_SHARE = 0.7
"""Of the rollbacks that are aimed at."""
LOADING_SECONDS, ROLLBACK_SECONDS = 4.0, 0.1
MAX_KILLS_A_ROUND = 60
NUM_FRUITLESS = 3
"""After so many kills in a row without a new checkpoint or stage, the run is let go on until it has one."""

SAVES = (SAVE, BEST_SAVE)
NUM_PARTS = 4
MINIMA: dict[str, tuple[float, Callable[[Mapping[str, Any]], bool]]] = {
    "inside a save": (0.3, lambda kill: kill["phase"] in SAVES),
    "inside the save of a best": (0.03, lambda kill: kill["phase"] == BEST_SAVE),
    "in a validation": (0.05, lambda kill: kill["phase"] == VALIDATION),
    "in a rollback": (0.01, lambda kill: kill["phase"] == ROLLBACK),
    "in the stages after training": (0.03, lambda kill: kill["phase"] in LATE_STAGES),
    "after the first best": (0.5, lambda kill: kill["has_best"]),
}
"""Share of the kills that must have fallen there, rounded down."""
MIN_PART_SHARE = 0.1
"""The same for each part of the run's steps."""

LOST = "no committed checkpoint is lost: all verify, the newest are there, and so is the best, after each kill"
RESUMED = "each restart resumes exactly, from the newest committed checkpoint or a newer one"
ENDED = "a process that is not killed ends well"


def find_part(kill: Mapping[str, Any]) -> int | None:
    """Which part of the run's steps a kill fell in, from 0; None after training."""
    return None if kill["phase"] in LATE_STAGES else min(NUM_PARTS - 1, int(NUM_PARTS * kill["progress"]))


# -------------------------------------------------------------------------------------------------------------- aiming


def measure_seconds(arm: Arm) -> dict[str, float]:
    """How long each phase that is aimed at takes, by the run that was left alone; of training, from save to save."""
    config = arm.load_config()
    stages = {
        event["stage"]: event["seconds"]
        for event in read_events(arm.layout.events)
        if event["kind"] == "stage_finished" and not event["skipped"]
    }
    return {
        LOADING: LOADING_SECONDS,
        TRAINING: evidence.stage_seconds(arm)
        / config.distillation.num_iterations
        * config.distillation.checkpoint_every_steps,
        SAVE: statistics.median(event["seconds"] for event in evidence.find_events(arm, "checkpoint")),
        VALIDATION: statistics.median(event["seconds"] for event in evidence.find_events(arm, "validation")),
        ROLLBACK: ROLLBACK_SECONDS,
        **{stage: stages[stage] for stage in LATE_STAGES},
    }


def await_moment(run: KilledRun, generator: random.Random, num_late: int) -> str | None:
    """Draw what to aim at and wait for the moment; returns the aim, or None when the run ended before it was there.

    `num_late`: kills of this round in the stages after training; each of these stages is aimed at once.
    """
    position = run.position
    aim = generator.choices(list(AIMS), [share for share, *_ in AIMS.values()])[0]
    phase, is_reached = AIMS[aim][1:]
    hits_rollback = generator.random() < ROLLBACK_SHARE
    num_steps, part = generator.uniform(0, MAX_STEPS_AHEAD), generator.random()
    if phase != LOADING:
        if not run.wait(lambda: position.is_in_loop or position.is_late):
            return None
        goal = position.step + num_steps

        def is_rolling_back() -> bool:
            return hits_rollback and position.is_rolling_back

        def is_there() -> bool:
            return position.is_late or is_rolling_back() or (position.step >= goal and is_reached(run))

        if not run.wait(is_there):
            return None
        if position.is_late:
            if not run.wait(lambda: position.is_late and LATE_STAGES.index(position.stage) >= num_late):
                return None
            aim = phase = LATE_STAGES[num_late]
        elif is_rolling_back():
            aim = phase = ROLLBACK
    time.sleep(part * run.seconds[phase])  # one sleep: looking on the way would cost a save its last part
    return aim


# --------------------------------------------------------------------------------------------------------------- kills


class Record:
    """Kills and rounds so far, on disk after each: what a later call carries on with."""

    def __init__(self, path: Path, seed: int) -> None:
        self.path = path
        self.data: dict[str, Any] = {"seed": seed, "kills": [], "rounds": [], LOST: [], RESUMED: [], ENDED: []}
        if path.exists():
            self.data = atomic.read_json(path)
            if self.data["seed"] != seed:
                raise BenchmarkError(
                    f"{path} was made with --seed {self.data['seed']}: give it again, or another --work"
                )

    @property
    def num_kills(self) -> int:
        return len(self.data["kills"])

    def kills_of(self, number: int) -> list[dict[str, Any]]:
        return [kill for kill in self.data["kills"] if kill["round"] == number]

    def save(self) -> None:
        atomic.write_json(self.path, self.data)


def kill_once(run: KilledRun, record: Record, number: int, generator: random.Random) -> bool:
    """Launch, aim, kill, look; False when the process ended by itself, well or not."""
    newest, start, advances = run.newest_announced, time.monotonic(), run.num_advances
    kills = record.kills_of(number)
    num_late = sum(kill["phase"] in LATE_STAGES for kill in kills)
    is_stuck = len(kills) >= NUM_FRUITLESS and not any(kill["has_advanced"] for kill in kills[-NUM_FRUITLESS:])
    run.launch()
    aim = None
    if num_late < len(LATE_STAGES) and (not is_stuck or run.wait(lambda: run.num_advances > advances)):
        aim = await_moment(run, generator, num_late)
    else:
        run.wait(lambda: False)
    if aim is None or not run.kill():
        look(run, record, newest, is_killed=False)
        return False
    traces, position = run.find_traces(), run.position
    kill = {
        "round": number,
        "aim": aim,
        "phase": position.find_phase(traces),
        "step": position.step,
        "attempt": position.attempt,
        "progress": position.step / position.num_iterations,
        "traces": traces,
        "has_best": position.has_best,
        "has_advanced": run.num_advances > advances,
        "seconds_alive": time.monotonic() - start,
    }
    record.data["kills"].append(kill)
    look(run, record, newest, is_killed=True)
    told = f"{kill['phase']} at step {kill['step']}, attempt {kill['attempt']} (aim: {aim})"
    print(f"kill {record.num_kills}, round {number}: {told} {', '.join(traces)}", flush=True)
    return True


def leave_alone(run: KilledRun, record: Record) -> None:
    """Launch, and let it end."""
    newest = run.newest_announced
    run.launch()
    run.wait(lambda: False)
    look(run, record, newest, is_killed=False)


def look(run: KilledRun, record: Record, newest: tuple[int, int] | None, *, is_killed: bool) -> None:
    """Note what the last launch lost; `newest` was the newest checkpoint that was told of before it."""
    when = f"{'at' if is_killed else 'after'} kill {record.num_kills}"
    record.data[LOST] += [f"{when}: {text}" for text in run.find_losses()]
    if newest is not None:
        for event in run.resumed:
            if not event["exact"] or (event["attempt"], event["step"]) < newest:
                record.data[RESUMED].append(f"{when}: {event['step']} {event['differences']}, committed {newest[1]}")
        if run.position.is_in_loop and not run.resumed:
            record.data[RESUMED].append(f"{when}: begun anew, committed {newest[1]}")
    if not is_killed and run.process.exitcode not in (EXIT_OK, EXIT_GATE_FAILED):
        record.data[ENDED].append(f"{when}: exit code {run.process.exitcode}")
    record.save()


# -------------------------------------------------------------------------------------------------------------- rounds


def build_run(arm: Arm, expected: Arm) -> KilledRun:
    config = arm.load_config()
    position = Position(config.distillation.num_iterations, config.validation.every_steps)
    return KilledRun(arm, config.keep_checkpoints, position, measure_seconds(expected))


def run_round(arm: Arm, expected: Arm, record: Record, num_kills: int, seed: int) -> None:
    """Kill one run until it ends, or until there were kills enough; then let it end, and compare it."""
    number, run = len(record.data["rounds"]) + 1, build_run(arm, expected)
    run.follow()
    try:
        for _ in range(2):  # a process that died of its own error is a failure, but the run may go on once
            while record.num_kills < num_kills and (in_round := len(record.kills_of(number))) < MAX_KILLS_A_ROUND:
                if not kill_once(run, record, number, random.Random(f"{seed} {number} {in_round}")):
                    break
            else:
                leave_alone(run, record)
            if run.process.exitcode in (EXIT_OK, EXIT_GATE_FAILED):
                break
        if run.process.exitcode not in (EXIT_OK, EXIT_GATE_FAILED) or not arm.is_done():
            raise BenchmarkError(f"{arm.folder} did not end well: see {arm.layout.logs}")
    finally:
        if run.process is not None and run.process.is_alive():  # this program is being ended: let the run save
            run.process.terminate()
            run.process.join()
        run.tail.close()
    compared = compare_runs(expected, arm)
    # The teacher is shared: only the run that was the first to need it has its steps.
    compared["missing_steps"] = [key for key in compared["missing_steps"] if key[0] == "distil"]
    record.data["rounds"].append({"compared": compared, "failures": find_failures(compared)})
    record.save()
    shutil.rmtree(arm.folder)


# ------------------------------------------------------------------------------------------------------------- program


def find_all_failures(record: Mapping[str, Any]) -> dict[str, list[str]]:
    """What each check found wrong, over all rounds; a check that holds has an empty list."""
    failures: dict[str, list[str]] = {check: list(record[check]) for check in (LOST, RESUMED, ENDED)}
    for number, entry in enumerate(record["rounds"], start=1):
        for check, found in entry["failures"].items():
            failures.setdefault(check, []).extend(f"round {number}: {item}" for item in found)
    return failures | find_shortfalls(record["kills"])


def find_shortfalls(kills: list[dict[str, Any]]) -> dict[str, list[str]]:
    """Where too few kills fell to show anything."""
    found = [(name, share, sum(map(is_there, kills))) for name, (share, is_there) in MINIMA.items()]
    for part in range(NUM_PARTS):
        num = sum(find_part(kill) == part for kill in kills)
        found.append((f"in part {part + 1} of {NUM_PARTS} of the steps", MIN_PART_SHARE, num))
    shortfalls = {}
    for name, share, num in found:
        needed = int(share * len(kills))
        shortfalls[f"at least {needed} of {len(kills)} kills {name}"] = [f"{num} kills"] if num < needed else []
    return shortfalls


def run_benchmark(options: Namespace) -> dict[str, Any]:
    work = options.work.resolve()
    shared = (f"teacher.cache_dir={work / 'teachers'}", f"num_threads={options.threads_per_arm}")
    settings = (*shared, *options.steps, *options.set)
    config = options.config.resolve()
    os.environ["OMP_NUM_THREADS"] = str(options.threads_per_arm)
    expected = Arm("uninterrupted", config, settings, work / "uninterrupted")
    common.run_arms([expected], 1, options.threads_per_arm)
    record = Record(work / "kills.json", options.seed)
    while record.num_kills < options.kills or (work / "killed").exists():
        killed = Arm("killed", config, settings, work / "killed")
        common.share_folders(expected.folder, killed.folder)
        run_round(killed, expected, record, options.kills, options.seed)
    return {
        "config": options.config.name,
        "settings": [*options.steps, *options.set],
        "seed": options.seed,
        "kills": record.data["kills"],
        "num_inside_save": sum(kill["phase"] in SAVES for kill in record.data["kills"]),
        "rounds": record.data["rounds"],
        "failures": find_all_failures(record.data),
    }


def format_results(data: Mapping[str, Any]) -> str:
    """The checks and the tables as Markdown."""
    kills = data["kills"]
    lines = [f"# Chaos: {evidence.describe_config(data)}", ""]
    lines += [
        f"{len(kills)} SIGKILLs in {len(data['rounds'])} runs, {data['num_inside_save']} of them inside a save,"
        " each run compared with one that was left alone:",
        "",
        *evidence.describe_checks(data["failures"]),
        "",
    ]
    rows: list[list[object]] = []
    for phase in PHASES:
        of_phase = [kill for kill in kills if kill["phase"] == phase]
        parts = [sum(find_part(kill) == part for kill in of_phase) for part in range(NUM_PARTS)]
        rows.append([phase, len(of_phase), *(["-"] * NUM_PARTS if phase in LATE_STAGES else parts)])
    header = ["killed in", "kills", *(f"part {part + 1} of the steps" for part in range(NUM_PARTS))]
    lines += [evidence.markdown_table(header, rows), ""]
    rows = []
    for number, entry in enumerate(data["rounds"], start=1):
        of_round = [kill for kill in kills if kill["round"] == number]
        compared = entry["compared"]
        num_steps = sum(compared["num_steps"].values())
        wrong = len(compared["different_steps"]) + len(compared["missing_steps"])
        inside = sum(kill["phase"] in SAVES for kill in of_round)
        replayed = sum(compared["num_losses"].values()) - num_steps
        rows.append([number, len(of_round), inside, num_steps, replayed, wrong])
    header = ["run", "kills", "inside a save", "steps", "replayed", "different or missing"]
    return "\n".join([*lines, evidence.markdown_table(header, rows)])


def main() -> int:
    parser = common.build_parser(
        "Kill small runs all along and inside saves, and compare them with one that was left alone.",
        SMALL_CONFIG,
        common.RESULTS / "work" / NAME,
    )
    parser.add_argument("--kills", type=int, default=200, metavar="N", help="over all calls with this --work")
    parser.add_argument("--seed", type=int, default=13, help="draws the moments")
    parser.add_argument("--steps", nargs="*", default=list(FEW_STEPS), metavar="KEY=VALUE", help="the run's length")
    options = parser.parse_args()
    if options.kills < 1:
        raise BenchmarkError(f"--kills {options.kills}: give at least 1")
    data = run_benchmark(options)
    return evidence.conclude(options.results, NAME, data, format_results(data))


if __name__ == "__main__":
    common.run_main(main)
