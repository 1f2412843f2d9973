"""Every state a run can be in, told from its files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from cvm_translator.observe.history import read_history
from cvm_translator.observe.status import format_status, read_status, summarise
from cvm_translator.runs.events import EventWriter
from cvm_translator.runs.layout import RunLayout
from cvm_translator.runs.lock import RunLock


@pytest.mark.parametrize(
    ("until", "state", "exit_code"),
    [("run_finished", "done", 0), ("stopped", "stopped", 3), ("failed", "failed", 4), ("distil", "dead", 3)],
)
def test_states_of_a_run_without_a_process(
    make_run: Callable[..., Path], until: str, state: str, exit_code: int
) -> None:
    status = read_status(make_run(until=until))
    assert (status["state"], status["exit_code"]) == (state, exit_code)
    assert ("dead_process" in [note["code"] for note in status["health"]]) == (state == "dead")
    assert json.loads(json.dumps(status)) == status


def test_a_held_lock_means_running(make_run: Callable[..., Path]) -> None:
    root = make_run(until="distil")
    with RunLock(root / "run.lock"):
        status = read_status(root)
    assert (status["state"], status["exit_code"]) == ("running", 0)
    assert read_status(root)["state"] == "dead"


def test_a_supervisor_without_a_trainer_means_restarting(make_run: Callable[..., Path]) -> None:
    root = make_run(until="distil")
    with RunLock(root / "supervisor.lock"):
        status = read_status(root)
        assert (status["state"], status["exit_code"], status["health"]) == ("restarting", 0, [])
        assert f"its supervisor {os.getpid()} starts another" in format_status(status)
        with RunLock(root / "run.lock"):
            status = read_status(root)
        assert (status["state"], status["supervisor_pid"]) == ("running", os.getpid())
        assert f"supervised by {os.getpid()}" in format_status(status)
    assert read_status(make_run("done"))["supervisor_pid"] is None


def test_a_hung_trainer_that_left_is_started_again(make_run: Callable[..., Path]) -> None:
    """It wrote `stopped`, since SIGTERM made it leave; but that was not the end of the run."""
    root = make_run(until="stopped")
    with RunLock(root / "supervisor.lock"):
        assert read_status(root)["state"] == "stopped"
        with EventWriter(root / "logs" / "events.jsonl") as events:
            events.write("warning", code="restart", message="the trainer hung; it is started again in 1 s")
        assert read_status(root)["state"] == "restarting"


def test_a_run_that_left_since_its_supervisor_died_says_so(make_run: Callable[..., Path]) -> None:
    root = make_run(until="distil")
    with EventWriter(root / "logs" / "events.jsonl") as events:
        events.write("stopped", signal=15, reason="the supervisor is gone")
    status = read_status(root)
    assert (status["state"], status["result"]["reason"]) == ("stopped", "the supervisor is gone")
    assert [note["code"] for note in status["health"]] == ["supervisor_gone"]
    text = format_status(status)
    assert "stopped by signal 15 (the supervisor is gone): carry on with cvm-translator resume" in text
    assert "! the supervisor died, and the run has left" in text
    with EventWriter(root / "logs" / "events.jsonl") as events:
        events.write("stopped", signal=15, reason="a request in control.json")
    status = read_status(root)
    assert status["health"] == []
    assert "(a request in control.json)" in format_status(status)


def test_a_pause_is_a_state_and_no_stall(make_run: Callable[..., Path]) -> None:
    root = make_run(until="distil")
    with RunLock(root / "run.lock"):
        for kind, state in (("paused", "paused"), ("continued", "running"), ("paused", "paused"), ("train", "running")):
            with EventWriter(root / "logs" / "events.jsonl") as events:
                events.write(kind, step=5, stage="distil", reason="the disk is full")
            status = read_status(root)
            assert (status["state"], status["exit_code"]) == (state, 0)
            is_paused = state == "paused"
            assert status["paused"] == ("the disk is full" if is_paused else None)
            assert ("paused (the disk is full) (process" in format_status(status)) == is_paused


def test_a_validation_for_the_record_is_no_point_of_the_curve(make_run: Callable[..., Path]) -> None:
    root = make_run(until="distil")
    before = len(read_history(RunLayout(root).events).validations)
    with EventWriter(root / "logs" / "events.jsonl") as events:
        events.write("validation", step=5, stage="distil", asked=True, scores={"bleu": 1.0})
    history = read_history(RunLayout(root).events)
    assert len(history.validations) == before
    assert read_status(root)["validation"]["scores"] == {"bleu": 1.0}


def test_no_folder_is_a_state_and_stays_away(tmp_path: Path) -> None:
    status = read_status(tmp_path / "nowhere")
    assert (status["state"], status["exit_code"]) == ("never_started", 3)
    assert "no run in" in format_status(status)
    assert not (tmp_path / "nowhere").exists()


def test_figures(make_run: Callable[..., Path]) -> None:
    status = read_status(make_run())
    assert (status["stage"], status["step"], status["num_iterations"], status["attempt"]) == ("distil", 1000, 1000, 2)
    assert status["executed_steps"] == 1100
    assert status["best_step"] == 1000 and status["verdict"]["verdict"] == "improved"
    assert [(r["from_step"], r["to_step"]) for r in status["rollbacks"]] == [(700, 600)]
    assert status["validation"]["scores"]["bleu"] == pytest.approx(33.1, abs=1.0)
    assert status["validation"]["teacher_scores"]["bleu"] == 34.6
    assert status["losses"]["recent_loss"] == pytest.approx(1.4, abs=0.2)
    assert status["steps_per_second"] == 2.5
    assert status["result"] == {
        "time": status["result"]["time"], "exit_code": 0, "gate_passed": True, "halted": False, "executed_steps": 1100,
        "seconds": 5210.0,
    }  # fmt: skip
    text = format_status(status)
    for part in ("done in 1 h 26 min", "1,000 of 1,000", "BLEU", "teacher 34.60", "700 -> 600"):
        assert part in text


@pytest.mark.parametrize(
    ("told", "shown"), [("0.5", "50 % of peak"), ("<b>", None), (None, None), (0.25, "25 % of peak")]
)
def test_utilisation_is_shown_where_it_is_a_number(
    make_run: Callable[..., Path], told: object, shown: str | None
) -> None:
    root = make_run(until="distil")
    with RunLock(root / "run.lock"):
        with EventWriter(root / "logs" / "events.jsonl") as events:
            events.write("progress", step=1000, stage="distil", utilisation=told, steps_per_second=2.0)
        text = format_status(read_status(root))
    assert ("of peak" in text) == (shown is not None) and (shown or "") in text


def test_a_restart_after_the_end_is_a_new_state(make_run: Callable[..., Path]) -> None:
    root = make_run(until="failed")
    with open(root / "logs" / "events.jsonl", "a") as stream:
        stream.write(
            json.dumps({"kind": "run_started", "time": "2026-03-02T08:00:00+00:00", "pid": 1, "step": None}) + "\n"
        )
    assert read_status(root)["state"] == "dead"


def _running(root: Path, now: float, **options: Any) -> list[str]:
    layout = RunLayout(root)
    history = read_history(layout.events)
    status = summarise(layout, history, {"pid": 1}, now, **options)
    return [note["code"] for note in status["health"]]


def _cut_after_step(root: Path, step: int) -> float:
    """Leave the diary as it was right after a step of the distillation; returns the time of that."""
    path = root / "logs" / "events.jsonl"
    kept: list[str] = []
    for line in path.read_text().splitlines():
        kept.append(line)
        event = json.loads(line)
        if event["kind"] == "train" and event["stage"] == "distil" and event["step"] == step:
            break
    path.write_text("\n".join(kept) + "\n")
    return datetime.fromisoformat(json.loads(kept[-1])["time"]).timestamp()


def test_a_stalled_step_is_noted(make_run: Callable[..., Path]) -> None:
    root = make_run(until="distil")
    last = _cut_after_step(root, 550)
    assert _running(root, last + 50) == []
    assert _running(root, last + 70) == ["stalled_step"]
    assert _running(root, last - 86400) == []  # the wall clock went back
    assert _running(root, last + 86400, idle_seconds=3.0) == []  # and forth: the monotonic clock knows better


def test_a_validation_that_is_due_is_no_stall(make_run: Callable[..., Path]) -> None:
    root = make_run(until="distil")
    last = _cut_after_step(root, 500)  # validated every 100; one takes 31 s here
    assert _running(root, last + 70) == []
    assert _running(root, last + 120) == ["stalled_step"]


def test_heartbeats_without_a_new_step_do_not_hide_a_stall(make_run: Callable[..., Path]) -> None:
    root = make_run(until="distil")
    last = _cut_after_step(root, 550)
    with open(root / "logs" / "events.jsonl", "a") as stream:
        for seconds in range(5, 90, 5):
            moment = datetime.fromtimestamp(last + seconds, UTC).isoformat()
            event = {"kind": "progress", "stage": "distil", "step": 550, "time": moment, "steps_per_second": 2.5}
            stream.write(json.dumps(event) + "\n")
    assert _running(root, last + 90) == ["stalled_step"]


def test_low_disk_is_noted(make_run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    root = make_run(until="distil")
    monkeypatch.setattr("cvm_translator.observe.status.free_bytes", lambda path: 100_000_000)
    assert "low_disk" in _running(root, time.time())


def test_messages_of_a_run_cannot_drive_the_terminal(make_run: Callable[..., Path]) -> None:
    root = make_run(until="distil")
    with open(root / "logs" / "events.jsonl", "a") as stream:
        stream.write(json.dumps({"kind": "failed", "message": "\x1b]0;owned\x07\u202e", "time": "x"}) + "\n")
    text = format_status(read_status(root))
    assert "\x1b" not in text and "\\x1b]0;owned\\x07\\u202e" in text


def test_status_starts_light(make_run: Callable[..., Path]) -> None:
    root = make_run(until="distil")
    code = (
        "import sys; from cvm_translator.observe.status import read_status, format_status;"
        f"format_status(read_status({str(root)!r}));"
        "print([m for m in ('torch', 'pydantic', 'matplotlib', 'rich', 'jinja2', 'apscheduler') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
