"""A run's events, folded into what observers show.

One reducer serves status, monitor and reports, so that they cannot disagree. It takes events in file order, keeps the
per-step numbers in flat arrays (a million steps fit in memory), and knows that steps come back: replayed after a crash
(same step, same attempt, same numbers: kept once) or repeated after a rollback (same step, a later attempt: the
earlier one is no longer part of the student's history).
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cvm_translator.observe.text import as_number, is_known, parse_time
from cvm_translator.runs.events import parse_event, read_lines

Event = dict[str, Any]

TRAIN_FIELDS = ("loss", "distillation_loss", "task_loss", "accuracy", "learning_rate", "grad_norm", "num_tokens")
STEP_STAGES = ("teacher", "distil")
NUM_RECENT = 200
RESTART_CODE = "restart"
"""Of the warning by which a supervisor tells that it starts the trainer again."""
LIFECYCLE = ("run_started", "stopped", "failed", "run_finished")


class TrainCurve:
    """The `train` events of one stage, as columns."""

    def __init__(self) -> None:
        self.steps = array("q")
        self.attempts = array("q")
        self.skipped = array("b")
        self.discarded = array("b")
        """1 where a rollback threw the step away."""
        self.columns: dict[str, array[float]] = {name: array("d") for name in TRAIN_FIELDS}
        self.executed_steps = 0

    def __len__(self) -> int:
        return len(self.steps)

    def add(self, event: Event) -> None:
        self.steps.append(int(event.get("step") or 0))
        self.attempts.append(int(event.get("attempt") or 1))
        self.skipped.append(bool(event.get("skipped")))
        self.discarded.append(0)
        for name, column in self.columns.items():
            column.append(as_number(event.get(name)))
        self.executed_steps = max(self.executed_steps, int(event.get("executed_step") or event.get("step") or 0))

    def is_distillation(self) -> bool:
        """Whether a teacher was heard at all; without one the task loss is the whole loss."""
        return any(value > 0 for value in self.columns["distillation_loss"])

    def discard_after(self, step: int) -> None:
        for row, other in enumerate(self.steps):
            if other > step:
                self.discarded[row] = 1

    def kept_rows(self) -> list[int]:
        """Rows of the model's own history, by step; of a step that a crash had replayed, the last row."""
        last = {step: row for row, step in enumerate(self.steps) if not self.discarded[row]}
        return [last[step] for step in sorted(last)]

    def discarded_rows(self) -> list[int]:
        return [row for row, gone in enumerate(self.discarded) if gone]


@dataclass
class History:
    """All that the events of a run folder tell; where a state is concerned, that of its newest start."""

    lifecycle: Event | None = None
    """The last event that started or ended the process: run_started, stopped, failed or run_finished."""
    run_started: Event | None = None
    resumed: Event | None = None
    stage: str | None = None
    stages_finished: dict[str, Event] = field(default_factory=dict)
    curves: dict[str, TrainCurve] = field(default_factory=dict)
    recent: deque[Event] = field(default_factory=lambda: deque(maxlen=NUM_RECENT))
    """The newest train events of the current stage."""
    progress: Event | None = None
    utilisations: dict[str, list[float]] = field(default_factory=dict)
    """What was told of each stage's share of the processor's peak, every few seconds."""
    last_validation: Event | None = None
    validations: list[Event] = field(default_factory=list)
    discarded_validations: list[Event] = field(default_factory=list)
    verdicts: list[Event] = field(default_factory=list)
    checkpoints: list[Event] = field(default_factory=list)
    rollbacks: list[Event] = field(default_factory=list)
    warnings: list[Event] = field(default_factory=list)
    restarts: list[Event] = field(default_factory=list)
    """Each restart after a death: the supervisor's warning of it, or else the run_started of a process whose
    forerunner had gone without a word."""
    num_events: int = 0
    step: int | None = None
    """Newest step of the current stage, or the one a rollback went back to."""
    paused: str | None = None
    """Why no step is being taken, while none is."""
    is_restarting: bool = False
    """Whether the supervisor has told that it starts the trainer again, and no trainer has begun since."""
    last_time: float | None = None
    last_advance: float | None = None
    """Time of the last event that shows work: any but a heartbeat with the step of the one before."""
    _heartbeat_mark: tuple[Any, Any] | None = None
    _is_restart_told: bool = False
    """Whether the supervisor has told of the restart that the next run_started is."""

    def add(self, event: Event) -> None:
        """Fold in one event. Unknown kinds are counted and otherwise passed over: a newer writer may have them.

        Of a run that began in the folder of another one, only its own events count.
        """
        if self._is_of_another_run(event):
            self.__dict__.update(History().__dict__)
        self.num_events += 1
        kind = event["kind"]
        time = parse_time(event.get("time"))
        if time is not None:
            self.last_time = time
            if kind != "progress" or self._advances(event):
                self.last_advance = time
        if kind in ("train", "continued", *LIFECYCLE):
            self.paused, self.is_restarting = None, False
        if kind == "train":
            self._add_train(event)
        elif kind == "paused":
            self.paused = str(event.get("reason"))
        elif kind in LIFECYCLE:
            if kind == "run_started":
                self._count_restart(event)
            self.lifecycle = event
            if kind == "run_started":
                self.run_started, self.stages_finished = event, {}
                self._enter_stage(None)
        elif kind == "stage_started":
            self._enter_stage(event.get("stage"))
        elif kind == "stage_finished":
            self.stages_finished[str(event.get("stage"))] = event
        elif kind == "progress":
            if event.get("stage") not in (None, self.stage):
                self._enter_stage(event["stage"])
            self.progress = event
            utilisation = as_number(event.get("utilisation"))
            if is_known(utilisation):
                self.utilisations.setdefault(str(self.stage), []).append(utilisation)
            self.step = event["step"] if isinstance(event.get("step"), int) else self.step
        elif kind == "resumed":
            self.resumed = event
            self.step = event["step"] if isinstance(event.get("step"), int) else self.step
        elif kind == "rollback":
            self._add_rollback(event)
        elif kind == "validation":
            self.last_validation = event
            if not event.get("asked"):  # one for the record is no point of the run's own course
                self.validations.append(event)
        elif kind in ("verdict", "checkpoint", "warning"):
            getattr(self, f"{kind}s").append(event)
            if kind == "warning" and event.get("code") == RESTART_CODE:
                self.is_restarting = True
                self.restarts.append(event)
                self._is_restart_told = True

    def _is_of_another_run(self, event: Event) -> bool:
        known = self.run_started.get("run_id") if self.run_started else None
        return event["kind"] == "run_started" and known is not None and event.get("run_id") not in (None, known)

    def _count_restart(self, event: Event) -> None:
        if not self._is_restart_told and (self.lifecycle or {}).get("kind") == "run_started":
            self.restarts.append(event)
        self._is_restart_told = False

    def _advances(self, event: Event) -> bool:
        mark = (event.get("stage"), event.get("step"))
        moved = mark != self._heartbeat_mark
        self._heartbeat_mark = mark
        return moved

    def _enter_stage(self, stage: str | None) -> None:
        self.stage, self.progress, self.step = stage, None, None
        self.recent.clear()

    def _add_train(self, event: Event) -> None:
        stage = str(event.get("stage") or self.stage or "distil")
        if stage != self.stage:
            self._enter_stage(stage)
        self.curves.setdefault(stage, TrainCurve()).add(event)
        self.recent.append(event)
        self.step = event["step"] if isinstance(event.get("step"), int) else self.step

    def _add_rollback(self, event: Event) -> None:
        known = ("stage", "attempt", "rollback_number", "from_step")
        if all(any(event.get(name) != other.get(name) for name in known) for other in self.rollbacks):
            self.rollbacks.append(event)
        to_step, stage = event.get("to_step"), event.get("stage") or "distil"
        if not isinstance(to_step, int):
            return
        self.step, self.progress = to_step, None
        self.recent.clear()
        if stage in self.curves:
            self.curves[stage].discard_after(to_step)
        gone = [v for v in of_stage(self.validations, stage) if (v.get("step") or 0) > to_step]
        self.discarded_validations += gone
        self.validations = [v for v in self.validations if v not in gone]

    @property
    def executed_steps(self) -> int:
        """Steps of the distillation that were computed, those that a rollback threw away included."""
        return self.curves["distil"].executed_steps if "distil" in self.curves else 0

    def best_step(self, stage: str = "distil") -> int | None:
        """Step of the best model so far, as the last verdict names it."""
        steps = [v["best_step"] for v in of_stage(self.verdicts, stage) if isinstance(v.get("best_step"), int)]
        best = [c for c in of_stage(self.checkpoints, stage) if c.get("is_best")]
        steps = steps or [c["step"] for c in best if isinstance(c.get("step"), int)]
        return steps[-1] if steps else None

    def student_validations(self) -> list[Event]:
        """Validations of the student's own history, by step."""
        last = {v["step"]: v for v in of_stage(self.validations, "distil") if isinstance(v.get("step"), int)}
        return [last[step] for step in sorted(last)]


def of_stage(events: Iterable[Event], stage: str) -> list[Event]:
    """The events of one stage; those that name none are the student's."""
    return [event for event in events if (event.get("stage") or "distil") == stage]


def read_history(path: Path, *, recent_train_only: bool = False) -> History:
    """The history in an events file and its rotated ones; a missing file gives an empty one.

    With `recent_train_only` the train events before the newest 200 are passed over unparsed: all that a status needs,
    ten times as fast.
    """
    history = History()
    lines = read_lines(path)
    for event in _newest_train_only(lines) if recent_train_only else _parsed(lines):
        history.add(event)
    return history


def _newest_train_only(lines: Iterable[bytes]) -> Iterator[Event]:
    """Events in order, of the train events only the newest 200."""
    waiting: deque[tuple[int, bytes]] = deque(maxlen=NUM_RECENT)
    others: list[tuple[int, bytes]] = []
    for number, line in enumerate(lines):
        # A quote inside a JSON string is escaped, so these bytes can only be the key itself.
        is_train = b'"kind": "train"' in line or b'"kind":"train"' in line
        (waiting if is_train else others).append((number, line))
    return _parsed(line for _, line in sorted([*others, *waiting]))


def _parsed(lines: Iterable[bytes]) -> Iterator[Event]:
    """Foreign lines are passed over."""
    for line in lines:
        if (event := parse_event(line)) is not None:
            yield event
