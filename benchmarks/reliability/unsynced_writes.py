"""What does a power cut leave of a save? Every operation recorded; what was not synced is lost, reordered or garbled.

A small real training gives the states that are saved. Each scenario fills a store, then records one save (see
`disk_model`). After every operation of it the disks that a crash could leave are built, and a new process's recovery is
run on each of them. Checked are, each time:

- a checkpoint is found, and it is the last committed one or the one being saved, byte for byte as it was meant;
- once `save` has returned it is the new one;
- `latest` points to it, and `best_model` to the last committed best, or to the new one if that is the best;
- nothing half-written is left, and no checkpoint's folder is damaged.

Now and then, on such a disk, the recovery itself is recorded and cut off in the same way, and the next save is made.

    python -m benchmarks.reliability.unsynced_writes

It takes a few minutes and begins anew each time. The program ends with 1 if a check fails.
"""

from __future__ import annotations

import argparse
import copy
import random
import shutil
import tempfile
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import common, evidence
from benchmarks.reliability.disk_model import Disk, list_states, list_unsynced, read_tree, record, write_tree
from benchmarks.reliability.small_training import build_loop
from cvm_translator.checkpoints.folder import verify_checkpoint
from cvm_translator.checkpoints.store import BEST, LATEST, CheckpointStore, SavedCheckpoint
from cvm_translator.errors import CheckpointError

NAME = "unsynced_writes"
KEEP = 2
NUM_STEPS = 12
RECOVERY_EVERY = 150
"""Of the states, so many apart, on which the recovery is itself cut off."""
NEXT_SAVE_EVERY = 20

FOUND = "a valid checkpoint is found"
COMMITTED = "it is the last committed one or the one being saved, byte for byte; the new one once the save returned"
LINKS = "latest points to it, and best_model to the newest committed best"
CLEAN = "nothing half-written and no damaged checkpoint is left"
NEXT = "the next save is made and found"
CHECKS = (FOUND, COMMITTED, LINKS, CLEAN, NEXT)


# ------------------------------------------------------------------------------------------------------- what is saved


@dataclass(frozen=True)
class Save:
    """The arguments of one `CheckpointStore.save`."""

    step: int
    attempt: int
    state: dict[str, Any]
    is_best: bool

    def run(self, store: CheckpointStore) -> str:
        """The name of the checkpoint."""
        return store.save(self.step, self.attempt, **self.state, is_best=self.is_best).path.name

    def changed(self, attempt: int = 1) -> Save:
        """The same step with another state, as a replay on another machine gives, or as another attempt."""
        state = copy.deepcopy(self.state)
        state["plain"]["loop"]["executed_steps"] += 1
        return Save(self.step, attempt, state, self.is_best)


class _Kept(CheckpointStore):
    """A store that keeps what it was asked to save."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory, keep=KEEP, report=lambda line: None)
        self.saves: list[Save] = []

    def save(self, step: int, attempt: int, *, is_best: bool, **state: Any) -> SavedCheckpoint:
        self.saves.append(Save(step, attempt, copy.deepcopy(state), is_best))
        return super().save(step, attempt, is_best=is_best, **state)


def collect_saves(directory: Path, dim: int = 8) -> dict[int, Save]:
    """What a real loop saves, by step: every 2 steps, a best every 4. `dim`: size of its model."""
    store = _Kept(directory / "checkpoints")
    loop = build_loop(directory, NUM_STEPS, store=store, dim=dim)
    try:
        loop.run()
    finally:
        loop.setup.events.close()
    return {save.step: save for save in store.saves}


@dataclass(frozen=True)
class Scenario:
    """Saves that were committed before, the one that is cut off, and the one that follows."""

    name: str
    before: Sequence[Save]
    save: Save
    following: Save


def list_scenarios(saves: Mapping[int, Save]) -> list[Scenario]:
    return [
        Scenario("the first checkpoint", [], saves[0], saves[2]),
        Scenario("a new best; two old ones go", [saves[2], saves[4], saves[6]], saves[8], saves[10]),
        Scenario("no best; the best stays", [saves[4], saves[6], saves[8]], saves[10], saves[12]),
        Scenario("a step saved again, changed", [saves[2], saves[4], saves[6]], saves[6].changed(), saves[8]),
        Scenario("a best saved again, changed", [saves[2], saves[4]], saves[4].changed(), saves[6]),
        Scenario("a step saved again, the same", [saves[2], saves[4], saves[6]], saves[6], saves[8]),
        Scenario("a new attempt's first", [saves[4], saves[6], saves[8]], saves[4].changed(2), saves[10].changed(2)),
    ]


# ---------------------------------------------------------------------------------------------------------- the checks


def open_store(directory: Path) -> CheckpointStore:
    return CheckpointStore(directory, KEEP, report=lambda line: None)


@dataclass(frozen=True)
class Expected:
    """What a recovery may find."""

    checkpoints: Mapping[str, Sequence[dict[str, Any]]]
    """Name to the contents it may have, of the last committed checkpoint and of the one being saved."""
    bests: Mapping[str, Sequence[dict[str, Any]]]
    """The same of the best one."""
    is_required: bool = True
    """Whether something was committed, so that something must be found."""


class Checker:
    """Runs a recovery on one disk and notes what is wrong with its result."""

    def __init__(self, work: Path, seed: int) -> None:
        self.directory = work / "store"
        self.generator = random.Random(seed)
        self.failures: dict[str, list[str]] = {check: [] for check in CHECKS}
        self.num_states = 0

    def lay_out(self, disk: Disk) -> None:
        shutil.rmtree(self.directory, ignore_errors=True)
        write_tree(self.directory, disk.tree())

    def check(self, disk: Disk, expected: Expected, what: str) -> None:
        """Recover and judge. The folder is left as the recovery left it."""
        self.num_states += 1
        self.lay_out(disk)
        try:
            loaded = open_store(self.directory).load_newest_valid()
        except (CheckpointError, OSError) as error:
            self.failures[FOUND].append(f"{what}: {error}")
            return
        if loaded is None:
            if expected.is_required:
                self.failures[FOUND].append(f"{what}: none")
            return
        name = loaded.path.name
        tree = read_tree(self.directory)
        if tree[name] not in expected.checkpoints.get(name, ()):
            self.failures[COMMITTED].append(f"{what}: {name}")
        best = tree.get(BEST, "-> none").removeprefix("-> ")
        has_best = best in expected.bests and tree.get(best) in expected.bests[best]
        is_behind = loaded.is_best and best != name
        if tree.get(LATEST) != f"-> {name}" or is_behind or (expected.bests and not has_best):
            self.failures[LINKS].append(f"{what}: latest {tree.get(LATEST)}, best {best}, found {name}")
        damaged = [entry for entry in open_store(self.directory).names() if not self._is_valid(entry)]
        left = [entry for entry in tree if entry.startswith(".")]
        if damaged or left:
            self.failures[CLEAN].append(f"{what}: {', '.join(damaged + left)}")

    def _is_valid(self, name: str) -> bool:
        try:
            verify_checkpoint(self.directory / name)
        except CheckpointError:
            return False
        return True

    def check_next(self, following: Save, what: str) -> None:
        """Save once more where a recovery has been."""
        name = following.run(open_store(self.directory))
        loaded = open_store(self.directory).load_newest_valid()
        if loaded is None or loaded.path.name != name:
            self.failures[NEXT].append(f"{what}: {loaded.path.name if loaded else None}")


def list_expected(scenario: Scenario, directory: Path) -> tuple[Expected, Expected]:
    """Fill the store, save, and take from both what may be found before the save has returned, and after."""
    for save in scenario.before:
        save.run(open_store(directory))
    before: dict[str, Any] = read_tree(directory)
    scratch = directory.with_name("scratch")
    write_tree(scratch, before)
    new = scenario.save.run(open_store(scratch))
    after: dict[str, Any] = read_tree(scratch)
    shutil.rmtree(scratch)

    def target(tree: Mapping[str, Any], link: str) -> str | None:
        return tree[link].removeprefix("-> ") if link in tree else None

    def contents(names: Sequence[tuple[Mapping[str, Any], str | None]]) -> dict[str, list[dict[str, Any]]]:
        found: dict[str, list[dict[str, Any]]] = {}
        for tree, name in names:
            if name is not None:
                found.setdefault(name, []).append(tree[name])
        return found

    old, old_best, new_best = target(before, LATEST), target(before, BEST), target(after, BEST)
    # A best that is saved again under its name stays the best, with the old content or the new one.
    during = Expected(
        contents([(before, old), (after, new)]),
        contents([(before, old_best), (after, new_best)]) if old_best else {},
        is_required=old is not None,
    )
    return during, Expected(contents([(after, new)]), contents([(after, new_best)]))


def run_scenario(scenario: Scenario, checker: Checker, num_random: int) -> dict[str, Any]:
    """Record the scenario's save, cut it off after every operation, recover from each disk."""
    directory, generator = checker.directory, checker.generator
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    during, after = list_expected(scenario, directory)
    recording = record(directory, lambda: scenario.save.run(open_store(directory)))
    num_states, num_recoveries = checker.num_states, 0
    points = list(list_unsynced(recording))
    for number, unsynced in enumerate(points):
        expected = after if number == len(points) - 1 else during
        for variant, disk in enumerate(list_states(unsynced, generator, num_random)):
            what = f"{scenario.name}, operation {number} of {len(points) - 1}, state {variant}"
            checker.check(disk, expected, what)
            if checker.num_states % NEXT_SAVE_EVERY == 0:
                checker.check_next(scenario.following, what)
            if checker.num_states % RECOVERY_EVERY == 0:
                num_recoveries += 1
                _cut_recovery_off(checker, disk, expected, what, num_random)
    return {
        "name": scenario.name,
        "num_operations": len(recording.operations),
        "num_points": len(points),
        "num_states": checker.num_states - num_states,
        "num_recoveries": num_recoveries,
    }


def _cut_recovery_off(checker: Checker, disk: Disk, expected: Expected, what: str, num_random: int) -> None:
    """The crash after the crash: what the recovery does is cut off as the save was."""
    checker.lay_out(disk)
    recording = record(checker.directory, lambda: open_store(checker.directory).load_newest_valid())
    for number, unsynced in enumerate(list_unsynced(recording)):
        for again in list_states(unsynced, checker.generator, min(num_random, 1)):
            checker.check(again, expected, f"{what}, recovery cut off at {number}")


# ------------------------------------------------------------------------------------------------------------- results


def run_benchmark(options: Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(dir=options.work) as folder:
        work = Path(folder)
        checker = Checker(work, options.seed)
        scenarios = list_scenarios(collect_saves(work / "training"))
        chosen = scenarios if options.scenario is None else [scenarios[number] for number in options.scenario]
        rows = []
        for scenario in chosen:
            rows.append(run_scenario(scenario, checker, options.num_random))
            print(f"{scenario.name}: {rows[-1]['num_states']} states", flush=True)
    return {
        "seed": options.seed,
        "num_random": options.num_random,
        "scenarios": rows,
        "num_states": checker.num_states,
        "failures": checker.failures,
    }


def format_results(data: Mapping[str, Any]) -> str:
    """The checks and the counts as Markdown."""
    lines = ["# What a power cut leaves of a save", ""]
    lines += [f"Recoveries from {data['num_states']:,} disks that a crash in the middle of a save could leave:", ""]
    lines += [*evidence.describe_checks(data["failures"]), ""]
    rows = [
        [row["name"], row["num_operations"], row["num_points"], f"{row['num_states']:,}", row["num_recoveries"]]
        for row in data["scenarios"]
    ]
    header = ["what is saved", "operations", "crashes", "disks recovered from", "recoveries cut off"]
    return "\n".join([*lines, evidence.markdown_table(header, rows)])


def build_parser() -> argparse.ArgumentParser:
    parser = common.build_plain_parser("Cut saves off after every operation and recover from what may be left.")
    parser.add_argument("--num-random", type=int, default=8, metavar="N", help="random states after each operation")
    parser.add_argument("--scenario", type=int, nargs="+", help="only these, from 0")
    parser.add_argument("--seed", type=int, default=13)
    parser.add_argument("--work", type=Path, help="where to lay disks out; default: the folder for temporary files")
    return parser


def main() -> int:
    options = build_parser().parse_args()
    data = run_benchmark(options)
    return evidence.conclude(options.results, NAME, data, format_results(data))


if __name__ == "__main__":
    common.run_main(main)
