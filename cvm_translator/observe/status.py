"""What a run is doing, from its files alone, in a fraction of a second.

`read_status` folds the events and the lock's holder into one plain dictionary (JSON-compatible, units in the names);
`format_status` writes it for a terminal. Only the standard library is imported, a run of 10,000 steps is read in a few
hundredths of a second, and nothing is written. A folder without a run is a state (`never_started`), not an error.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean, median
from typing import Any

from cvm_translator.errors import EXIT_FAILED, EXIT_NOT_RUNNING, EXIT_OK
from cvm_translator.observe.history import STEP_STAGES, Event, History, of_stage, read_history
from cvm_translator.observe.text import (
    as_number,
    format_bytes,
    format_count,
    format_number,
    format_percent,
    format_score,
    format_seconds,
    is_known,
    ordered_metrics,
    parse_time,
    printable,
    short_metric_name,
)
from cvm_translator.runs.layout import RunLayout
from cvm_translator.runs.lock import read_holder

EXIT_CODES = {
    "running": EXIT_OK,
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


def read_status(run_dir: str | Path) -> dict[str, Any]:
    """The state of the run in `run_dir`; see `summarise` for the keys."""
    layout = RunLayout(Path(run_dir))
    history = read_history(layout.events, recent_train_only=True)
    return summarise(layout, history, read_holder(layout.lock), time.time())


def summarise(
    layout: RunLayout,
    history: History,
    holder: Mapping[str, Any] | None,
    now: float,
    idle_seconds: float | None = None,
) -> dict[str, Any]:
    """One dictionary of everything a status shows, at the Unix time `now`.

    `idle_seconds`, where given, is the time without progress by a monotonic clock; else it is taken from the events'
    times. Keys that nothing is known about hold None.
    """
    state = find_state(history, holder)
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
        "memory_mib": progress.get("memory_mib"),
        "eta_seconds": progress.get("eta_seconds") if state == "running" else None,
        "idle_seconds": idle_seconds,
        "num_warnings": len(history.warnings),
        "last_warning": _fields(history.warnings[-1], "code", "message", "step") if history.warnings else None,
        "result": _result(history, state),
    }
    status["health"] = find_health(layout, history, status, step_seconds)
    return status


def find_state(history: History, holder: Mapping[str, Any] | None) -> str:
    """running, stopped, done, failed, dead (the process is gone without a word) or never_started."""
    if holder is not None:
        return "running"
    if history.lifecycle is None:
        return "dead" if history.num_events else "never_started"
    ends = {"stopped": "stopped", "failed": "failed", "run_finished": "done"}
    return ends.get(history.lifecycle["kind"], "dead")


def measure_step_seconds(history: History) -> float | None:
    """Seconds of a recent step, from the last heartbeat, else from the times of the newest train events."""
    speed = as_number((history.progress or {}).get("steps_per_second"))
    if speed > 0:
        return 1 / speed
    times = [(event.get("step"), parse_time(event.get("time"))) for event in history.recent]
    gaps = [b - a for (_, a), (_, b) in zip(times, times[1:], strict=False) if a is not None and b is not None]
    return median(gaps) or None if gaps else None


def find_health(
    layout: RunLayout, history: History, status: Mapping[str, Any], step_seconds: float | None
) -> list[dict[str, str]]:
    """Notes on what is wrong, each with a `code` and a `message`; empty when all is well."""
    notes: list[dict[str, str]] = []
    if status["state"] == "dead":
        text = f"process {status['pid']} is gone without a word: carry on with cvm-translator resume {layout.root}"
        notes.append({"code": "dead_process", "message": text})
    idle = status["idle_seconds"]
    if status["state"] == "running" and history.stage in STEP_STAGES and history.step is not None and idle is not None:
        limit = max(MIN_STALL_SECONDS, STALL_FACTOR * (step_seconds or 0.0))
        if idle > limit and idle > max(limit, _validation_allowance(layout, history)):
            text = f"no step for {format_seconds(idle)} after step {history.step} of {history.stage}"
            notes.append({"code": "stalled_step", "message": text})
    free, needed = free_bytes(layout.root), MIN_FREE_BYTES
    if history.checkpoints and is_known(history.checkpoints[-1].get("num_bytes")):
        needed = max(needed, 3 * int(history.checkpoints[-1]["num_bytes"]))
    if free is not None and free < needed and status["state"] not in ("never_started", "done"):
        text = f"{format_bytes(free)} free on the disk of {layout.root}, {format_bytes(needed)} advised: make room"
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
    if last is None or state == "running":
        return None
    if last["kind"] == "run_finished":
        return _fields(last, "time", "exit_code", "gate_passed", "halted", "executed_steps", "seconds")
    if last["kind"] == "failed":
        return _fields(last, "time", "message")
    return _fields(last, "time", "signal") if last["kind"] == "stopped" else None


def headline(status: Mapping[str, Any]) -> str:
    """One line: the state, and for an ended run how it ended."""
    state, result = status["state"], status["result"] or {}
    if state == "never_started":
        return f"no run in {printable(status['run_dir'])}: begin one with cvm-translator start CONFIG"
    if state == "running":
        return f"running (process {status['pid']}), stage {printable(status['stage'] or 'starting')}"
    if state == "failed":
        return f"failed: {printable(result.get('message'))}"
    if state == "stopped":
        signal = result.get("signal")
        return f"stopped{f' by signal {signal}' if signal else ''}: carry on with cvm-translator resume"
    if state == "dead":
        return f"dead: process {status['pid']} is gone; carry on with cvm-translator resume"
    gate = {True: "the gate passed", False: "the gate FAILED"}.get(result.get("gate_passed"), "not gated")
    halted = ", halted by the guard with the best model" if result.get("halted") else ""
    return f"done in {format_seconds(result.get('seconds'))}: {gate}{halted}"


def format_status(status: Mapping[str, Any]) -> str:
    """The status as lines for a terminal, every foreign character made visible."""
    lines = [f"{printable(status['run_dir'])}: {headline(status)}"]
    if status["state"] == "never_started":
        return lines[0]
    lines += [f"  {name:<12}{printable(text)}" for name, text in _status_lines(status) if text]
    lines += [f"  ! {printable(note['message'])}" for note in status["health"]]
    return "\n".join(lines)


def _status_lines(status: Mapping[str, Any]) -> list[tuple[str, str]]:
    losses, checkpoint, verdict = status["losses"] or {}, status["checkpoint"], status["verdict"]
    return [
        ("step", describe_step(status)),
        ("speed", describe_speed(status)),
        ("loss", describe_losses(losses)),
        ("validation", describe_validation(status["validation"])),
        ("verdict", describe_verdict(verdict) if verdict else ""),
        ("best", f"step {status['best_step']}" if status["best_step"] is not None else ""),
        ("rollbacks", "; ".join(f"{r['from_step']} -> {r['to_step']} ({r['reason']})" for r in status["rollbacks"])),
        (
            "checkpoint",
            f"step {checkpoint['step']}, {format_seconds(checkpoint['age_seconds'])} ago" if checkpoint else "",
        ),
        (
            "warnings",
            f"{status['num_warnings']}, last: {status['last_warning']['message']}" if status["last_warning"] else "",
        ),
    ]


def describe_step(status: Mapping[str, Any]) -> str:
    if status["step"] is None:
        return ""
    total, step = status["num_iterations"], status["step"]
    text = f"{step:,} of {total:,} ({100 * step / total:.1f} %)" if total else f"{step:,}"
    attempt = f", attempt {status['attempt']}" if (status["attempt"] or 1) > 1 else ""
    executed = status["executed_steps"]
    more = f", {executed:,} executed" if executed > step and status["stage"] == "distil" else ""
    return f"{text}{attempt}{more}"


def describe_speed(status: Mapping[str, Any]) -> str:
    if not is_known(status["steps_per_second"]) or status["state"] != "running":
        return ""
    parts = [f"{format_number(status['steps_per_second'])} steps/s"]
    if is_known(status["tokens_per_second"]):
        parts.append(f"{format_count(status['tokens_per_second'])} tokens/s")
    if is_known(status["eta_seconds"]):
        parts.append(f"{format_seconds(status['eta_seconds'])} left in this stage")
    return ", ".join(parts)


def describe_losses(losses: Mapping[str, Any]) -> str:
    if not is_known(losses.get("recent_loss")):
        return ""
    names = {"recent_distillation_loss": "distillation", "recent_task_loss": "task"}
    parts = [f"{label} {format_number(losses[key], 4)}" for key, label in names.items() if is_known(losses.get(key))]
    detail = f" ({', '.join(parts)})" if parts else ""
    accuracy = f", accuracy {format_percent(losses['recent_accuracy'])}" if is_known(losses["recent_accuracy"]) else ""
    return f"{format_number(losses['recent_loss'], 4)}{detail}{accuracy}, last {format_number(losses['last'], 4)}"


def describe_validation(validation: Mapping[str, Any] | None) -> str:
    if not validation:
        return ""
    scores, teacher = validation["scores"] or {}, validation["teacher_scores"] or {}
    parts = [
        f"{short_metric_name(key)} {format_score(key, scores[key])}"
        + (f" (teacher {format_score(key, teacher[key])})" if is_known(teacher.get(key)) else "")
        for key in ordered_metrics(scores)
        if key in ("bleu", "chrf", "ter", "bertscore") and is_known(scores[key])
    ]
    quality = validation["quality_score"]
    if is_known(quality):
        parts.insert(0, f"quality {format_percent(quality)} of the teacher")
    return f"step {validation['step']}: {', '.join(parts)}"


def describe_verdict(verdict: Mapping[str, Any]) -> str:
    text = f"step {verdict['step']}: {verdict['verdict']}"
    if is_known(verdict["drop"]) and verdict["verdict"] not in ("first", "improved"):
        text += f", drop {format_percent(verdict['drop'])}"
        if is_known(verdict["drop_lower_bound"]):
            text += f" (at least {format_percent(verdict['drop_lower_bound'])}, margin {format_percent(verdict['margin'], 0)})"
    action = verdict["action"]
    return text + (f" -> {action.replace('_', ' ')}" if action not in (None, "none", "keep") else "")
