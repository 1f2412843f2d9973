"""Steps that come back: replayed after a crash, or repeated after a rollback."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cvm_translator.observe.history import History, read_history


def _train(step: int, attempt: int = 1, loss: float = 1.0) -> dict[str, Any]:
    return {"kind": "train", "stage": "distil", "step": step, "attempt": attempt, "loss": loss, "executed_step": step}


def test_replayed_steps_count_once() -> None:
    history = History()
    for step in [1, 2, 3, 2, 3, 4]:
        history.add(_train(step))
    curve = history.curves["distil"]
    assert [curve.steps[row] for row in curve.kept_rows()] == [1, 2, 3, 4]
    assert curve.discarded_rows() == []


def test_rollback_discards_what_came_after() -> None:
    history = History()
    for step in [1, 2, 3, 4]:
        history.add(_train(step))
    history.add({"kind": "validation", "stage": "distil", "step": 2, "attempt": 1})
    history.add({"kind": "validation", "stage": "distil", "step": 4, "attempt": 1})
    history.add({"kind": "rollback", "step": 4, "attempt": 1, "from_step": 4, "to_step": 2, "rollback_number": 1})
    assert history.step == 2
    history.add(_train(3, attempt=2, loss=9.0))
    curve = history.curves["distil"]
    assert [(curve.steps[row], curve.attempts[row]) for row in curve.kept_rows()] == [(1, 1), (2, 1), (3, 2)]
    assert [curve.steps[row] for row in curve.discarded_rows()] == [3, 4]
    assert [v["step"] for v in history.student_validations()] == [2]
    assert [v["step"] for v in history.discarded_validations] == [4]


def test_a_rollback_told_twice_counts_once() -> None:
    history = History()
    event = {"kind": "rollback", "attempt": 1, "from_step": 4, "to_step": 2, "rollback_number": 1}
    history.add(event)
    history.add(dict(event))
    assert len(history.rollbacks) == 1


def test_teacher_and_student_are_kept_apart(make_run: Callable[..., Path]) -> None:
    history = read_history(make_run() / "logs" / "events.jsonl")
    assert len(history.curves["teacher"]) == 500
    assert len(history.curves["distil"].kept_rows()) == 1000
    assert len(history.curves["distil"].discarded_rows()) == 100
    assert [v["step"] for v in history.student_validations()] == list(range(100, 1001, 100))
    assert history.executed_steps == 1100


def test_the_quick_reading_agrees_with_the_full_one(make_run: Callable[..., Path]) -> None:
    path = make_run(until="distil") / "logs" / "events.jsonl"
    quick, full = read_history(path, recent_train_only=True), read_history(path)
    assert list(quick.recent) == list(full.recent)
    assert (quick.step, quick.stage, quick.executed_steps) == (full.step, full.stage, full.executed_steps)
    assert quick.validations == full.validations and quick.last_advance == full.last_advance


def test_torn_and_foreign_lines_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    whole = json.dumps(_train(1))
    path.write_bytes(
        f'{whole}\n{{"kind": "tra\nnot json\n[1]\n{json.dumps({"kind": "unknown_kind"})}\n'.encode()
        + b"\xff\xfe\n"
        + whole.encode()
    )
    history = read_history(path)
    assert history.num_events == 2  # the last line has no end yet
    assert history.curves["distil"].steps.tolist() == [1]


def test_another_run_in_the_same_folder_begins_a_new_history() -> None:
    """What the run before it had trained, validated and rolled back is not this one's; a restart of it is."""
    history = History()
    history.add({"kind": "run_started", "run_id": "a", "pid": 1})
    history.add({"kind": "stage_started", "stage": "distil"})
    history.add(_train(1))
    history.add({"kind": "warning", "code": "x", "message": "y"})
    history.add({"kind": "validation", "stage": "distil", "step": 1, "attempt": 1})
    history.add({"kind": "rollback", "step": 4, "from_step": 4, "to_step": 0, "rollback_number": 1})
    for run_id in ("a", None):
        history.add({"kind": "run_started", "run_id": run_id, "pid": 2})
        assert (len(history.curves["distil"]), len(history.rollbacks)) == (1, 1)
    history.run_started = {"run_id": "a"}
    start = {"kind": "run_started", "run_id": "b", "pid": 3}
    history.add(start)
    fresh = History()
    fresh.add(start)
    assert history == fresh
