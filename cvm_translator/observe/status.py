"""What a run is doing, from its files alone, in a fraction of a second.

`read_status` folds the events and the lock's holder into one plain dictionary (JSON-compatible, units in the names);
`format_status` writes it for a terminal. Only the standard library is imported, a run of 10,000 steps is read in a few
hundredths of a second, and nothing is written. A folder without a run is a state (`never_started`), not an error.
"""

from __future__ import annotations

import itertools
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean, median
from typing import Any

from cvm_translator.errors import EXIT_FAILED, EXIT_NOT_RUNNING, EXIT_OK
from cvm_translator.observe.describe import HELD_STATES, format_status
from cvm_translator.observe.history import STEP_STAGES, Event, History, of_stage, read_history
from cvm_translator.observe.text import (
    as_number,
    format_bytes,
    format_seconds,
    is_known,
    parse_time,
)
from cvm_translator.runs.heartbeat import SUPERVISOR_GONE
from cvm_translator.runs.layout import RunLayout
from cvm_translator.runs.lock import read_holder
from cvm_translator.runs.secrets import redact

EXIT_CODES = {
    "running": EXIT_OK,
    "paused": EXIT_OK,
    "restarting": EXIT_OK,
    "done": EXIT_OK,
    "stopped": EXIT_NOT_RUNNING,
    "dead": EXIT_NOT_RUNNING,
    "never_started": EXIT_NOT_RUNNING,
    "failed": EXIT_FAILED,
}
NUM_RECENT_STEPS = 50
MIN_STALL_SECONDS = 60.0
STALL_FACTOR = 20.0
FIRST_VALIDATION_SECONDS = 900.0
"""What a validation may take before one has been seen; afterwards three times the longest."""
MIN_FREE_BYTES = 1 << 30


__all__ = ["find_state", "format_status", "read_run", "read_status", "show_status", "summarise"]


def read_status(run_dir: str | Path) -> dict[str, Any]:
    """The state of the run in `run_dir`; see `summarise` for the keys."""
    layout = RunLayout(Path(run_dir))
    history, holder, supervisor = read_run(layout, recent_train_only=True)
    return summarise(layout, history, holder, time.time(), supervisor=supervisor)


def read_run(
    layout: RunLayout, *, recent_train_only: bool = False
) -> tuple[History, dict[str, Any] | None, dict[str, Any] | None]:
    """The events of a run, and who holds its lock and its supervisor's (None: nobody)."""
    # The holder first: a run writes its last event before it lets go of the lock. One that begins between the two
    # looks dead, so that answer is asked for twice.
    for _ in range(2):
        holder, supervisor = read_holder(layout.lock), read_holder(layout.supervisor_lock)
        history = read_history(layout.events, recent_train_only=recent_train_only)
        if find_state(history, holder, supervisor) != "dead":
            break
    return history, holder, supervisor


def show_status(run_dir: str | Path, *, as_json: bool) -> int:
    """Print the state of a run; returns the exit code that goes with it."""
    status = read_status(run_dir)
    print(redact(json.dumps(status, indent=2)) if as_json else format_status(status))
    return int(status["exit_code"])


def summarise(
    layout: RunLayout,
    history: History,
    holder: Mapping[str, Any] | None,
    now: float,
    idle_seconds: float | None = None,
    supervisor: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """One dictionary of everything a status shows, at the Unix time `now`.

    `idle_seconds`, where given, is the time without progress by a monotonic clock; else it is taken from the events'
    times. Keys that nothing is known about hold None.
    """
    state = find_state(history, holder, supervisor)
    shown = "teacher" if history.stage == "teacher" else "distil"
    started = history.run_started or {}
    progress = history.progress or {}
    checkpoint = history.checkpoints[-1] if history.checkpoints else None
    if idle_seconds is None and history.last_advance is not None:
        idle_seconds = max(0.0, now - history.last_advance)
    step_seconds = measure_step_seconds(history)
    status: dict[str, Any] = {
        "run_dir": str(layout.root),
        "run_id": started.get("run_id"),
        "state": state,
        "exit_code": EXIT_CODES[state],
        "pid": (holder or {}).get("pid") or started.get("pid"),
        "supervisor_pid": (supervisor or {}).get("pid"),
        "paused": history.paused if state == "paused" else None,
        "started_at": started.get("time"),
        "stage": history.stage,
        "stages": started.get("stages"),
        "stages_finished": list(history.stages_finished),
        "step": history.step,
        "num_iterations": progress.get("num_iterations")
        or (started.get("num_iterations") if history.stage != "teacher" else None),
        "attempt": history.recent[-1].get("attempt") if history.recent else None,
        "executed_steps": history.executed_steps,
        "losses": _losses(history),
        "validation": _validation(history),
        "verdict": _verdict(of_stage(history.verdicts, shown)),
        "best_step": history.best_step(shown),
        "rollbacks": [
            _fields(r, "from_step", "to_step", "reason", "rollback_number") for r in of_stage(history.rollbacks, shown)
        ],
        "checkpoint": _checkpoint(checkpoint, now),
        "steps_per_second": progress.get("steps_per_second") or (1 / step_seconds if step_seconds else None),
        "tokens_per_second": progress.get("tokens_per_second"),
        "utilisation": progress.get("utilisation"),
        "memory_mib": progress.get("memory_mib"),
        "eta_seconds": progress.get("eta_seconds") if state == "running" else None,
        "idle_seconds": idle_seconds,
        "disk_free_bytes": free_bytes(layout.root),
        "disk_advised_bytes": _advised_bytes(history),
        "num_warnings": len(history.warnings),
        "last_warning": _fields(history.warnings[-1], "code", "message", "step") if history.warnings else None,
        "result": _result(history, state),
    }
    status["health"] = find_health(layout, history, status, step_seconds)
    return status


def find_state(history: History, holder: Mapping[str, Any] | None, supervisor: Mapping[str, Any] | None = None) -> str:
    """running, paused, restarting, stopped, done, failed, dead (gone without a word) or never_started.

    restarting: the trainer is gone, and its supervisor is about to start it again.
    """
    if holder is not None:
        return "paused" if history.paused else "running"
    if history.lifecycle is None:
        return "dead" if history.num_events else "never_started"
    if supervisor is not None and (history.is_restarting or history.lifecycle["kind"] == "run_started"):
        return "restarting"
    ends = {"stopped": "stopped", "failed": "failed", "run_finished": "done"}
    return ends.get(history.lifecycle["kind"], "dead")


def measure_step_seconds(history: History) -> float | None:
    """Seconds of a recent step, from the last heartbeat, else from the times of the newest train events."""
    speed = as_number((history.progress or {}).get("steps_per_second"))
    if speed > 0:
        return 1 / speed
    times = [(event.get("step"), parse_time(event.get("time"))) for event in history.recent]
    gaps = [b - a for (_, a), (_, b) in itertools.pairwise(times) if a is not None and b is not None]
    return median(gaps) or None if gaps else None


def find_health(
    layout: RunLayout, history: History, status: Mapping[str, Any], step_seconds: float | None
) -> list[dict[str, str]]:
    """Notes on what is wrong, each with a `code` and a `message`; empty when all is well."""
    notes: list[dict[str, str]] = []
    state = status["state"]
    if state == "dead":
        text = f"process {status['pid']} is gone without a word: carry on with cvm-translator resume {layout.root}"
        notes.append({"code": "dead_process", "message": text})
    if state == "stopped" and status["result"]["reason"] == SUPERVISOR_GONE:
        text = f"the supervisor died, and the run has left: carry on with cvm-translator resume {layout.root}"
        notes.append({"code": "supervisor_gone", "message": text})
    idle = status["idle_seconds"]
    if state == "running" and history.stage in STEP_STAGES and history.step is not None and idle is not None:
        limit = max(MIN_STALL_SECONDS, STALL_FACTOR * (step_seconds or 0.0))
        if idle > limit and idle > max(limit, _validation_allowance(layout, history)):
            text = f"no step for {format_seconds(idle)} after step {history.step} of {history.stage}"
            notes.append({"code": "stalled_step", "message": text})
    free, advised = status["disk_free_bytes"], status["disk_advised_bytes"]
    if free is not None and free < advised and state not in ("never_started", "done"):
        text = f"{format_bytes(free)} free on the disk of {layout.root}, {format_bytes(advised)} advised: make room"
        notes.append({"code": "low_disk", "message": text})
    return notes


def _validation_allowance(layout: RunLayout, history: History) -> float:
    """How long the step may rest because a validation is due at it; 0 when none is."""
    import yaml

    try:
        config = yaml.load(
            layout.config.read_text(encoding="utf-8"), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)
        )
        section = config["teacher"]["training"] if history.stage == "teacher" else config["validation"]
        every = int(section["validate_every_steps" if history.stage == "teacher" else "every_steps"])
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError):
        every = 1000
    step, last = history.step or 0, (history.progress or {}).get("num_iterations")
    if step % every and step != last and step != 0:
        return 0.0
    seconds = [as_number(v.get("seconds")) for v in history.validations if is_known(v.get("seconds"))]
    return 3 * max(seconds) if seconds else FIRST_VALIDATION_SECONDS


def _advised_bytes(history: History) -> int:
    """What should be free: room for three more checkpoints, and some for everything else."""
    last = history.checkpoints[-1].get("num_bytes") if history.checkpoints else None
    return max(MIN_FREE_BYTES, 3 * int(as_number(last)) if is_known(last) else 0)


def free_bytes(path: Path) -> int | None:
    try:
        disk = os.statvfs(path)
    except OSError:
        return None
    return disk.f_bavail * disk.f_frsize


def _fields(event: Event, *names: str) -> dict[str, Any]:
    return {name: event.get(name) for name in names}


def _losses(history: History) -> dict[str, Any] | None:
    if not history.recent:
        return None
    rows = [event for event in list(history.recent)[-NUM_RECENT_STEPS:] if not event.get("skipped")]
    losses: dict[str, Any] = {"last": history.recent[-1].get("loss"), "num_recent_steps": len(rows)}
    for name in ("loss", "distillation_loss", "task_loss", "accuracy", "grad_norm"):
        known = [as_number(event[name]) for event in rows if is_known(event.get(name))]
        losses[f"recent_{name}"] = fmean(known) if known else None
    losses["learning_rate"] = history.recent[-1].get("learning_rate")
    losses["num_skipped_recent"] = sum(bool(event.get("skipped")) for event in history.recent)
    return losses


def _validation(history: History) -> dict[str, Any] | None:
    if history.last_validation is None:
        return None
    return _fields(
        history.last_validation,
        *("step", "attempt", "stage", "time", "scores", "teacher_scores", "quality_score", "retentions", "probes"),
    )


def _verdict(verdicts: list[Event]) -> dict[str, Any] | None:
    if not verdicts:
        return None
    return _fields(
        verdicts[-1],
        *("step", "attempt", "verdict", "drop", "drop_lower_bound", "margin", "best_step", "reason", "action"),
    )


def _checkpoint(event: Event | None, now: float) -> dict[str, Any] | None:
    if event is None:
        return None
    written = parse_time(event.get("time"))
    age = max(0.0, now - written) if written is not None else None
    return {**_fields(event, "path", "step", "attempt", "is_best", "num_bytes"), "age_seconds": age}


def _result(history: History, state: str) -> dict[str, Any] | None:
    """How the run ended, for one that did."""
    last = history.lifecycle
    if last is None or state in HELD_STATES:
        return None
    if last["kind"] == "run_finished":
        return _fields(last, "time", "exit_code", "gate_passed", "halted", "executed_steps", "seconds")
    if last["kind"] == "failed":
        return _fields(last, "time", "message")
    return _fields(last, "time", "signal", "reason") if last["kind"] == "stopped" else None
