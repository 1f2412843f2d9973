"""A status and its parts in words, for terminals and reports.

Pure functions from the dictionaries of `status` and from events to text. Foreign text stays as it is here; whoever
prints it escapes it (`format_status` does).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cvm_translator.observe.text import (
    format_bytes,
    format_count,
    format_number,
    format_percent,
    format_score,
    format_seconds,
    is_known,
    ordered_metrics,
    short_metric_name,
)
from cvm_translator.runs.text import printable

HELD_STATES = ("running", "paused")
"""States in which the run's process is there."""


def headline(status: Mapping[str, Any]) -> str:
    """One line: the state, and for an ended run how it ended."""
    state, result = status["state"], status["result"] or {}
    if state == "never_started":
        return f"no run in {printable(status['run_dir'])}: begin one with cvm-translator start CONFIG"
    if state in HELD_STATES:
        by = f", supervised by {status['supervisor_pid']}" if status["supervisor_pid"] else ""
        why = f" ({printable(status['paused'])})" if state == "paused" else ""
        return f"{state}{why} (process {status['pid']}{by}), stage {printable(status['stage'] or 'starting')}"
    if state == "restarting":
        return f"restarting: process {status['pid']} is gone, its supervisor {status['supervisor_pid']} starts another"
    if state == "failed":
        return f"failed: {printable(result.get('message'))}"
    if state == "stopped":
        how = f" by signal {printable(result['signal'])}" if result.get("signal") else ""
        why = f" ({printable(result['reason'])})" if result.get("reason") else ""
        return f"stopped{how}{why}: carry on with cvm-translator resume"
    if state == "dead":
        return f"dead: process {status['pid']} is gone; carry on with cvm-translator resume"
    gate = describe_gate(result.get("gate_passed"))
    halted = ", halted by the guard with the best model" if result.get("halted") else ""
    return f"done in {format_seconds(result.get('seconds'))}: {gate}{halted}"


def describe_gate(passed: Any) -> str:
    return "not gated" if passed is None else "the gate passed" if passed else "the gate FAILED"


def format_status(status: Mapping[str, Any]) -> str:
    """The status as lines for a terminal, every foreign character made visible."""
    lines = [f"{printable(status['run_dir'])}: {headline(status)}"]
    if status["state"] == "never_started":
        return lines[0]
    lines += [f"  {name:<12}{printable(text)}" for name, text in status_lines(status) if text]
    lines += [f"  ! {printable(note['message'])}" for note in status["health"]]
    return "\n".join(lines)


def status_lines(status: Mapping[str, Any]) -> list[tuple[str, str]]:
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
    if is_known(status["utilisation"]):
        parts.append(f"{format_percent(status['utilisation'], 0)} of peak")
    if is_known(status["eta_seconds"]):
        parts.append(f"{format_seconds(status['eta_seconds'])} left in this stage")
    return ", ".join(parts)


def describe_losses(losses: Mapping[str, Any]) -> str:
    if not is_known(losses.get("recent_loss")):
        return ""
    parts = []
    if losses.get("recent_distillation_loss"):  # else the task loss is the whole loss
        parts.append(f"distillation {format_number(losses['recent_distillation_loss'], 4)}")
        parts.append(f"task {format_number(losses['recent_task_loss'], 4)}")
    detail = f" ({', '.join(parts)})" if parts else ""
    accuracy = f", accuracy {format_percent(losses['recent_accuracy'])}" if is_known(losses["recent_accuracy"]) else ""
    return f"{format_number(losses['recent_loss'], 4)}{detail}{accuracy}, last {format_number(losses['last'], 4)}"


def describe_validation(validation: Mapping[str, Any] | None) -> str:
    if not validation:
        return ""
    scores, teacher = validation.get("scores") or {}, validation.get("teacher_scores") or {}
    parts = [
        f"{short_metric_name(key)} {format_score(key, scores[key])}"
        + (f" (teacher {format_score(key, teacher[key])})" if is_known(teacher.get(key)) else "")
        for key in ordered_metrics(scores)
        if key in ("bleu", "chrf", "ter", "bertscore") and is_known(scores[key])
    ]
    quality = validation.get("quality_score")
    if is_known(quality):
        # While the teacher itself is trained there is none to compare with.
        parts.insert(0, f"quality {format_percent(quality)} of the teacher" if teacher else f"quality {quality:.3f}")
    return f"step {validation.get('step')}: {', '.join(parts)}"


def describe_verdict(verdict: Mapping[str, Any]) -> str:
    name, drop, at_least = verdict.get("verdict"), verdict.get("drop"), verdict.get("drop_lower_bound")
    text = f"step {verdict.get('step')}: {str(name).replace('_', ' ')}"
    if is_known(drop) and name not in ("first", "improved"):
        text += f", drop {format_percent(drop)}"
        if is_known(at_least):
            text += f" (at least {format_percent(at_least)}, margin {format_percent(verdict.get('margin'), 0)})"
    action = verdict.get("action")
    return text + (f" -> {action.replace('_', ' ')}" if action not in (None, "none", "keep") else "")


def describe_event(event: Mapping[str, Any]) -> str | None:
    """One line for an event of interest; None for those that come with every step or heartbeat."""
    describe = _EVENTS.get(str(event["kind"]))
    return describe(event) if describe else None


def _describe_stage_finished(event: Mapping[str, Any]) -> str:
    if event.get("skipped"):
        return f"stage {event.get('stage')}: nothing to do, taken over from before"
    return f"stage {event.get('stage')} finished in {format_seconds(event.get('seconds'))}"


def _describe_rollback(event: Mapping[str, Any]) -> str:
    return (
        f"rollback {event.get('rollback_number')}: from step {event.get('from_step')} to {event.get('to_step')},"
        f" learning rate x {format_number(event.get('learning_rate_factor'), 3)},"
        f" data stream {event.get('data_stream')}: {event.get('reason')}"
    )


def _describe_checkpoint(event: Mapping[str, Any]) -> str:
    best = ", the best so far" if event.get("is_best") else ""
    return f"checkpoint at step {event.get('step')}, {format_bytes(event.get('num_bytes'))}{best}"


def _describe_resumed(event: Mapping[str, Any]) -> str:
    if event.get("exact"):
        return f"resumed at step {event.get('step')}, exactly"
    differences = "; ".join(str(item) for item in event.get("differences") or [])
    return f"resumed at step {event.get('step')}, not bit for bit: {differences}"


def _describe_stop(event: Mapping[str, Any]) -> str:
    at = f" at step {event['step']}" if event.get("step") is not None else ""
    why = f": {event['reason']}" if event.get("reason") else ""
    return f"stopped by signal {event.get('signal')}{at}{why}"


def _describe_finish(event: Mapping[str, Any]) -> str:
    gate = describe_gate(event.get("gate_passed"))
    halted = ", halted" if event.get("halted") else ""
    return (
        f"run finished after {format_seconds(event.get('seconds'))}: {gate}{halted}, exit code {event.get('exit_code')}"
    )


_EVENTS = {
    "run_started": lambda e: (
        f"run started (process {e.get('pid')}), {format_count(e.get('num_iterations'))} iterations"
    ),
    "stage_started": lambda e: f"stage {e.get('stage')} started",
    "stage_finished": _describe_stage_finished,
    "validation": lambda e: f"validation at {describe_validation(e)}",
    "verdict": lambda e: f"verdict at {describe_verdict(e)}",
    "checkpoint": _describe_checkpoint,
    "rollback": _describe_rollback,
    "warning": lambda e: f"warning: {e.get('message')}",
    "stopped": _describe_stop,
    "resumed": _describe_resumed,
    "control": lambda e: f"request {e.get('action')}: {e.get('result')}, {e.get('message')}",
    "paused": lambda e: f"paused after step {e.get('step')}: {e.get('reason')}",
    "continued": lambda e: f"goes on after step {e.get('step')}",
    "failed": lambda e: f"failed: {e.get('message')}",
    "run_finished": _describe_finish,
}
