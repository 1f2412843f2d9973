"""Hundreds of SIGKILLs on small real runs, many of them inside a save: is anything lost, is any bit different?

Rounds: one run after the other is killed again and again until it ends by itself, then compared with one that was left
alone. A kill comes at a random moment, or as soon as a save's temporary folder is seen plus a random part of a save's
time. It counts as *inside a save* only if it left evidence: a temporary folder or link of the checkpoint store that no
finished save leaves behind. Checked are:

- after each kill: the best checkpoint, and the newest that the events tell of unless newer ones have taken its place,
  verify byte for byte;
- after each restart: the run resumed from that checkpoint or a newer one, and says that it is exact;
- after each round: every loss and all weights are those of the run that was left alone (see `kill_resume`).

    python -m benchmarks.reliability.chaos --kills 200

Kills are counted over all calls with the same --work: one that is interrupted carries on. All runs share one trained
teacher, so that it is the student's training that is hit. Restarted processes are forked from one that has imported the
libraries; each is a process of its own, killed by SIGKILL, with nothing kept of what it held. The program ends with 1
if a check fails, or if too few kills were inside a save.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import time
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks import common, evidence
from benchmarks.common import Arm, BenchmarkError
from benchmarks.reliability.forked import Forge
from benchmarks.reliability.kill_resume import compare_runs, find_failures
from cvm_translator.checkpoints.folder import verify_checkpoint
from cvm_translator.checkpoints.store import CheckpointStore
from cvm_translator.errors import CheckpointError
from cvm_translator.runs import atomic
from cvm_translator.runs.atomic import TEMPORARY_PREFIX
from cvm_translator.runs.events import EventTail
from cvm_translator.runs.lock import read_holder

NAME = "chaos"
SMALL_CONFIG = Path(__file__).with_name("small.yaml")
STUDENT_STEPS = (
    "distillation.num_iterations=600",
    "distillation.checkpoint_every_steps=10",
    "validation.every_steps=150",
)
SAVE_SHARE = 0.7
"""Of the kills that are aimed at a save; some of them miss."""
MIN_SAVE_SHARE = 0.3
MAX_KILLS_A_ROUND = 40
MAX_SECONDS_ALIVE = 6.0
"""A kill at a random moment comes within so long after the restart."""
SAVE_SECONDS = 0.15
"""A kill aimed at a save comes within so long after its first trace, or within the time of the last save if shorter."""
NUM_FRUITLESS = 3
"""After so many kills in a row without a new checkpoint or stage, the run is let go on until it has one."""
TIMEOUT_SECONDS = 1800.0
_POLL_SECONDS = 0.001

LOST = "no committed checkpoint is lost: the newest and the best verify after each kill"
RESUMED = "each restart resumes exactly, from the newest committed checkpoint or a newer one"


# ------------------------------------------------------------------------------------------------------ one killed run


class KilledRun:
    """Launches one run, aims at it, and looks at what a kill has left."""

    def __init__(self, arm: Arm, num_kept: int) -> None:
        """`num_kept`: the config's keep_checkpoints."""
        self.arm = arm
        self.checkpoints = arm.layout.checkpoints
        self.store = CheckpointStore(self.checkpoints, num_kept, report=print)
        self.tail = EventTail(arm.layout.events)
        self.committed: str | None = None
        """The checkpoint of the student that the events told of last."""
        self.committed_at = (0, -1)
        self.save_seconds = SAVE_SECONDS
        """What the last save took."""
        self.num_advances = 0
        """Checkpoints and stages that were seen to be finished."""
        self.position = "nothing"
        self.resumed: list[dict[str, Any]] = []
        self.old_traces: dict[str, int] = {}
        self.forge = Forge()
        self.process: Any = None

    def launch(self) -> None:
        self.resumed, self.old_traces = [], {}
        self.old_traces = self.find_traces()
        arguments = [*self.arm.command()[len(common.PROGRAM) :], "--no-progress"]
        self.process = self.forge.launch(arguments, self.arm.layout.logs / "benchmark.log")

    def follow(self) -> None:
        """Take in the new events."""
        for event in self.tail.poll():
            if event["kind"] == "train":
                self.position = f"{event['stage']} step {event['step']}"
            elif event["kind"] == "stage_started":
                self.position = f"stage {event['stage']}"
            elif event["kind"] == "stage_finished":
                self.num_advances += 1
            elif event["kind"] == "resumed" and event["stage"] == "distil":
                self.resumed.append(event)
            elif event["kind"] == "checkpoint" and event["stage"] == "distil":
                self.num_advances += 1
                self.committed, self.committed_at = event["path"], (event["attempt"], event["step"])
                self.save_seconds = event["seconds"]

    def find_traces(self) -> dict[str, int]:
        """What only an unfinished save leaves in the store's folder, with inodes: this launch's own, not older ones."""
        found = {}
        with contextlib.suppress(FileNotFoundError), os.scandir(self.checkpoints) as entries:
            for entry in entries:
                if entry.name.startswith((TEMPORARY_PREFIX, ".replaced-")):
                    found[entry.name] = entry.inode()
        return {name: inode for name, inode in found.items() if self.old_traces.get(name) != inode}

    def wait(self, is_reached: Any) -> bool:
        """Follow until something is reached; False when the run ended before."""
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while time.monotonic() < deadline:
            if is_reached():
                return True
            if not self.process.is_alive():
                self.follow()
                return False
            time.sleep(_POLL_SECONDS)
        raise BenchmarkError(f"the run made no progress for {TIMEOUT_SECONDS:.0f} s: see {self.arm.layout.logs}")

    def has_advanced(self, since: int) -> bool:
        self.follow()
        return self.num_advances > since

    def kill(self) -> None:
        """SIGKILL, and wait until nothing of the process is left."""
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.join()
        while read_holder(self.arm.layout.lock) is not None:  # a helper of it may end a moment later
            time.sleep(0.01)
        self.follow()

    def find_losses(self) -> list[str]:
        """Which committed checkpoints do not verify any more: the best, and the newest that the events tell of.

        The latter may have made room for newer ones that were committed and whose event the kills prevented.
        """
        best = self.checkpoints / "best_model"
        lost = self._find_damage(os.readlink(best)) if best.is_symlink() else []
        if self.committed is not None and (damage := self._find_damage(self.committed)):
            newer = [name for name in self.store.names() if self._is_newer(name)]
            lost += damage if len(newer) < self.store.keep else []
        return lost

    def _find_damage(self, name: str) -> list[str]:
        try:
            verify_checkpoint(self._settled(name))
        except CheckpointError as error:
            return [str(error)]
        return []

    def _is_newer(self, name: str) -> bool:
        """Whether a checkpoint verifies and came after the one that the events told of last."""
        try:
            manifest = verify_checkpoint(self.checkpoints / name)
        except CheckpointError:
            return False
        return (manifest.attempt, manifest.step) > self.committed_at

    def _settled(self, name: str) -> Path:
        """Where a checkpoint is: set aside, if the kill came between the two renames that replace it."""
        aside = self.checkpoints / f".replaced-{name}"
        return aside if aside.exists() and not (self.checkpoints / name).exists() else self.checkpoints / name


# ------------------------------------------------------------------------------------------------------------- kills


class Record:
    """Kills and rounds so far, on disk after each: what a later call carries on with."""

    def __init__(self, path: Path, seed: int) -> None:
        self.path = path
        self.data: dict[str, Any] = {"seed": seed, "kills": [], "rounds": [], LOST: [], RESUMED: []}
        if path.exists():
            self.data = atomic.read_json(path)
            if self.data["seed"] != seed:
                raise BenchmarkError(
                    f"{path} was made with --seed {self.data['seed']}: give it again, or another --work"
                )

    @property
    def num_kills(self) -> int:
        return len(self.data["kills"])

    def save(self) -> None:
        atomic.write_json(self.path, self.data)


def kill_once(run: KilledRun, record: Record, generator: random.Random, number: int) -> bool:
    """Launch, aim, kill, look; False when the run had ended by itself."""
    committed_at = run.committed_at
    run.launch()
    start, fruitless = time.monotonic(), _count_fruitless(record, number)
    is_aimed = generator.random() < SAVE_SHARE
    advances = run.num_advances
    if fruitless >= NUM_FRUITLESS and not run.wait(lambda: run.has_advanced(advances)):
        return False
    if is_aimed:
        if not run.wait(run.find_traces):
            return False
        time.sleep(generator.uniform(0.0, min(run.save_seconds, SAVE_SECONDS)))
    else:
        moment = time.monotonic() + generator.uniform(0.0, MAX_SECONDS_ALIVE)
        if not run.wait(lambda: time.monotonic() > moment):
            return False
    if not run.process.is_alive():
        return False
    run.kill()
    lost, traces = run.find_losses(), sorted(run.find_traces())
    note_resumed(run, record, committed_at)
    record.data[LOST] += [f"kill {record.num_kills + 1}: {text}" for text in lost]
    record.data["kills"].append(
        {
            "round": number,
            "at": run.position,
            "is_aimed": is_aimed,
            "traces": traces,
            "has_advanced": run.num_advances > advances,
            "seconds_alive": time.monotonic() - start,
        }
    )
    record.save()
    print(f"kill {record.num_kills}, round {number}, at {run.position}: {', '.join(traces) or '-'}", flush=True)
    return True


def note_resumed(run: KilledRun, record: Record, committed_at: tuple[int, int]) -> None:
    """Look at what the last launch resumed from; `committed_at` was the newest checkpoint when it was launched."""
    for event in run.resumed:
        if not event["exact"] or (event["attempt"], event["step"]) < committed_at:
            record.data[RESUMED].append(f"kill {record.num_kills}: {event['step']}, committed {committed_at[1]}")


def _count_fruitless(record: Record, number: int) -> int:
    count = 0
    for kill in reversed(record.data["kills"]):
        if kill["has_advanced"] or kill["round"] != number:
            break
        count += 1
    return count


def run_round(arm: Arm, expected: Arm, record: Record, num_kills: int, seed: int) -> None:
    """Kill one run until it ends, or until there were kills enough; then let it end, and compare it."""
    number = len(record.data["rounds"]) + 1
    run = KilledRun(arm, arm.load_config().keep_checkpoints)
    run.follow()
    try:
        while not arm.is_done():
            in_round = sum(kill["round"] == number for kill in record.data["kills"])
            generator = random.Random(f"{seed} {number} {in_round}")
            may_kill = record.num_kills < num_kills and in_round < MAX_KILLS_A_ROUND
            if may_kill and kill_once(run, record, generator, number):
                continue
            committed_at = run.committed_at
            if not arm.is_done():
                run.launch()
                run.process.join()
                run.follow()
            note_resumed(run, record, committed_at)
            if not arm.is_done():
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
    failures: dict[str, list[str]] = {LOST: list(record[LOST]), RESUMED: list(record[RESUMED])}
    for number, entry in enumerate(record["rounds"], start=1):
        for check, found in entry["failures"].items():
            failures.setdefault(check, []).extend(f"round {number}: {item}" for item in found)
    num_inside = sum(bool(kill["traces"]) for kill in record["kills"])
    num_kills = len(record["kills"])
    failures[f"at least {MIN_SAVE_SHARE:.0%} of the kills were inside a save"] = (
        [f"{num_inside} of {num_kills}"] if num_inside < MIN_SAVE_SHARE * num_kills else []
    )
    return failures


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
        "num_inside_save": sum(bool(kill["traces"]) for kill in record.data["kills"]),
        "rounds": record.data["rounds"],
        "failures": find_all_failures(record.data),
    }


def format_results(data: Mapping[str, Any]) -> str:
    """The checks and the tables as Markdown."""
    lines = [f"# Chaos: {evidence.describe_config(data)}", ""]
    lines += [
        f"{len(data['kills'])} SIGKILLs in {len(data['rounds'])} runs, {data['num_inside_save']} of them inside a save,"
        " each run compared with one that was left alone:",
        "",
        *evidence.describe_checks(data["failures"]),
        "",
    ]
    rows: list[list[object]] = []
    for number, entry in enumerate(data["rounds"], start=1):
        kills = [kill for kill in data["kills"] if kill["round"] == number]
        compared = entry["compared"]
        replayed = sum(compared["num_losses"].values()) - sum(compared["num_steps"].values())
        wrong = len(compared["different_steps"]) + len(compared["missing_steps"])
        inside = sum(bool(kill["traces"]) for kill in kills)
        rows.append([number, len(kills), inside, sum(compared["num_steps"].values()), replayed, wrong])
    header = ["run", "kills", "inside a save", "steps", "replayed", "different or missing"]
    return "\n".join([*lines, evidence.markdown_table(header, rows)])


def main() -> int:
    parser = common.build_parser(
        "Kill small runs at random moments and inside saves, and compare them with one that was left alone.",
        SMALL_CONFIG,
        common.RESULTS / "work" / NAME,
    )
    parser.add_argument("--kills", type=int, default=200, metavar="N", help="over all calls with this --work")
    parser.add_argument("--seed", type=int, default=13, help="draws the moments")
    parser.add_argument("--steps", nargs="*", default=list(STUDENT_STEPS), metavar="KEY=VALUE", help="the run's length")
    options = parser.parse_args()
    if options.kills < 1:
        raise BenchmarkError(f"--kills {options.kills}: give at least 1")
    data = run_benchmark(options)
    return evidence.conclude(options.results, NAME, data, format_results(data))


if __name__ == "__main__":
    common.run_main(main)
