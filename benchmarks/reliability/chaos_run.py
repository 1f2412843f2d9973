"""One run that is killed again and again: launched, followed by its events, killed, and looked at.

Each process is forked from one that has imported the libraries, leads a group of its own, and dies with its group by
SIGKILL; nothing is kept of what it held. Where a kill fell is told by the disk alone: by the events, and by what only
an unfinished save leaves in the checkpoint store's folder.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import common
from benchmarks.common import Arm, BenchmarkError
from benchmarks.reliability.forked import Forge
from cvm_translator.checkpoints.folder import verify_checkpoint
from cvm_translator.checkpoints.store import BEST, LATEST, CheckpointStore
from cvm_translator.errors import CheckpointError
from cvm_translator.runs.atomic import TEMPORARY_PREFIX
from cvm_translator.runs.events import EventTail
from cvm_translator.runs.lock import read_holder

LOADING, TRAINING, VALIDATION, ROLLBACK = "loading", "training", "validation", "rollback"
SAVE, BEST_SAVE = "save", "save of a best"
LATE_STAGES = ("quantise", "gate", "report")
PHASES = (LOADING, TRAINING, SAVE, BEST_SAVE, VALIDATION, ROLLBACK, *LATE_STAGES)

TIMEOUT_SECONDS = 1800.0
_POLL_SECONDS = 0.002
_ASIDE_PREFIX = ".replaced-"
_DECISION_PREFIX = f"{TEMPORARY_PREFIX}rollback.json"


# ------------------------------------------------------------------------------------------------------ where a run is


@dataclass
class Position:
    """Where a run is, as its events tell; steps lag by those that were not written yet."""

    num_iterations: int
    validate_every_steps: int
    stage: str = "nothing"
    step: int = 0
    attempt: int = 1
    is_in_loop: bool = False
    """Whether this process has taken up the student's loop: the store has recovered from the last kill by then."""
    is_validating: bool = False
    is_rolling_back: bool = False
    verdict: dict[str, Any] | None = None
    """Of a validation whose checkpoint is not committed yet."""
    has_best: bool = False

    @property
    def is_late(self) -> bool:
        return self.stage in LATE_STAGES

    def begin(self) -> None:
        """A new process, of which no event tells yet."""
        self.stage, self.is_in_loop = "nothing", False
        self._settle()

    def take_in(self, event: dict[str, Any]) -> None:
        kind = event["kind"]
        if kind == "stage_started":
            self.stage = event["stage"]
        elif event.get("stage") == "distil":
            self._take_in_loop(kind, event)

    def _take_in_loop(self, kind: str, event: dict[str, Any]) -> None:
        if kind == "train" and not event["skipped"]:
            self.step = event["step"]
            self.is_validating = self.step % self.validate_every_steps == 0 or self.step == self.num_iterations
        elif kind == "verdict":
            self.is_validating, self.verdict = False, event
            self.is_rolling_back = event["action"] == "roll_back"
        elif kind == "rollback":
            self.is_validating, self.is_rolling_back = False, True
        elif kind in ("resumed", "checkpoint"):
            self.step, self.attempt, self.is_in_loop = event["step"], event["attempt"], True
            self.has_best |= kind == "checkpoint" and event["is_best"]
            self._settle()

    def _settle(self) -> None:
        self.is_validating, self.is_rolling_back, self.verdict = False, False, None

    def find_phase(self, traces: list[str]) -> str:
        """What a process that was killed here and left these traces was doing."""
        if self.is_late:
            return self.stage
        if not self.is_in_loop:
            return LOADING
        if any(name.startswith(_DECISION_PREFIX) for name in traces):
            return ROLLBACK
        if traces:
            is_best = self.verdict is not None and self.verdict["best_step"] == self.verdict["step"]
            return BEST_SAVE if is_best else SAVE
        if self.is_rolling_back:
            return ROLLBACK
        return VALIDATION if self.is_validating else TRAINING


# ------------------------------------------------------------------------------------------------------ one killed run


class KilledRun:
    """Launches one run, follows it, kills it, and looks at what is left."""

    def __init__(self, arm: Arm, num_kept: int, position: Position, seconds: dict[str, float]) -> None:
        """`num_kept`: the config's keep_checkpoints; `seconds`: how long things take, kept up as this run does them."""
        self.arm = arm
        self.position = position
        self.seconds = seconds
        self.store = CheckpointStore(arm.layout.checkpoints, num_kept, report=print)
        self.tail = EventTail(arm.layout.events)
        self.announced: dict[str, tuple[int, int]] = {}
        """(attempt, step) of every checkpoint of the student that the events told of."""
        self.announced_best: tuple[int, int] | None = None
        self.num_advances = 0
        """New checkpoints, and stages that were done and not found done."""
        self.resumed: list[dict[str, Any]] = []
        """What the last launch told of its resume."""
        self.forge = Forge()
        self.process: Any = None

    @property
    def newest_announced(self) -> tuple[int, int] | None:
        return max(self.announced.values(), default=None)

    def launch(self) -> None:
        self.resumed = []
        self.position.begin()
        arguments = [*self.arm.command()[len(common.PROGRAM) :], "--no-progress"]
        log = self.arm.layout.logs / "benchmark.log"
        self.process = self.forge.launch(arguments, log)

    def follow(self) -> None:
        """Take in the new events."""
        for event in self.tail.poll():
            self.position.take_in(event)
            if event["kind"] == "stage_finished":
                self.num_advances += not event["skipped"]
            elif event["kind"] == "validation" and event["stage"] == "distil":
                self.seconds[VALIDATION] = event["seconds"]
            elif event["kind"] == "resumed" and event["stage"] == "distil":
                self.resumed.append(event)
            elif event["kind"] == "checkpoint" and event["stage"] == "distil":
                self.num_advances += event["path"] not in self.announced
                self.seconds[SAVE] = event["seconds"]
                self.announced[event["path"]] = at = (event["attempt"], event["step"])
                if event["is_best"]:
                    self.announced_best = max(self.announced_best or at, at)

    def find_traces(self) -> list[str]:
        """What an unfinished save of this launch has left in the store's folder.

        Before the loop is taken up there is nothing of the kind: what is seen then is of an earlier launch, or of the
        recovery from it.
        """
        if not self.position.is_in_loop:
            return []
        with contextlib.suppress(FileNotFoundError), os.scandir(self.store.directory) as entries:
            return sorted(entry.name for entry in entries if entry.name.startswith((TEMPORARY_PREFIX, _ASIDE_PREFIX)))
        return []

    def wait(self, is_reached: Callable[[], bool]) -> bool:
        """Follow until something is reached; False when the process ended before."""
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while time.monotonic() < deadline:
            self.follow()
            if is_reached():
                return True
            if not self.process.is_alive():
                self.follow()
                return False
            time.sleep(_POLL_SECONDS)
        raise BenchmarkError(f"the run made no progress for {TIMEOUT_SECONDS:.0f} s: see {self.arm.layout.logs}")

    def kill(self) -> bool:
        """SIGKILL to the process and its helpers, and wait until they are gone; False if it had ended before."""
        if self.process.is_alive():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
        self.process.kill()  # it leads no group yet in the first moment after its launch
        self.process.join()
        while read_holder(self.arm.layout.lock) is not None:  # a helper may end a moment later
            time.sleep(_POLL_SECONDS)
        self.follow()
        return bool(self.process.exitcode == -signal.SIGKILL)

    # ----------------------------------------------------------------------------------------------- what was lost

    def find_losses(self) -> list[str]:
        """What of the committed checkpoints is damaged, gone, or not pointed to any more.

        Each that bears a checkpoint's name must verify. The newest `keep` of all that were told of or are there must
        be there: older ones make room. `latest` and `best_model` must point to what was told of last, or to a newer
        one that was committed and whose event the kill prevented.
        """
        valid: dict[str, tuple[int, int]] = {}
        losses = []
        for name, path in self._find_places().items():
            try:
                manifest = verify_checkpoint(path)
            except CheckpointError as error:
                losses.append(str(error))
            else:
                valid[name] = (manifest.attempt, manifest.step)
        known = self.announced | valid
        newest = sorted(known, key=known.__getitem__, reverse=True)[: self.store.keep]
        losses += [f"{name} is not there any more" for name in newest if name not in valid]
        for link, told in ((LATEST, self.newest_announced), (BEST, self.announced_best)):
            losses += self._find_link_loss(link, told, valid)
        return losses

    def _find_places(self) -> dict[str, Path]:
        """Name to folder; one that was being replaced stands aside for a moment between two renames."""
        directory = self.store.directory
        places = {path.name.removeprefix(_ASIDE_PREFIX): path for path in directory.glob(f"{_ASIDE_PREFIX}*")}
        return places | {name: directory / name for name in self.store.names()}

    def _find_link_loss(self, link: str, told: tuple[int, int] | None, valid: dict[str, tuple[int, int]]) -> list[str]:
        target = self.store.link_target(link)
        if target is None:
            return [f"{link} is not there any more"] if told is not None else []
        if target not in valid:
            return [f"{link} points to {target}, which does not verify"]
        return [f"{link} went back to {target}"] if told is not None and valid[target] < told else []
