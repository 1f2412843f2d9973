"""An alert is told once, by this monitor and by the next."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cvm_translator.observe.alerts import AlertBook, LowDisk, alerts_of_event, alerts_of_status
from cvm_translator.observe.history import read_history
from cvm_translator.observe.status import read_status
from cvm_translator.runs.events import EventWriter, read_events


def _names(root: Path) -> list[str]:
    return [alert.name for event in read_events(root / "logs" / "events.jsonl") for alert in alerts_of_event(event)]


def test_alerts_of_a_run_with_a_rollback(make_run: Callable[..., Path]) -> None:
    assert _names(make_run()) == ["degradation", "rollback", "finished"]
    assert _names(make_run("healthy", rollback=False)) == ["finished"]
    assert _names(make_run("failed", until="failed")) == ["degradation", "rollback", "failed"]


def test_alerts_of_the_end() -> None:
    def names(**fields: Any) -> list[str]:
        return [alert.name for alert in alerts_of_event({"kind": "run_finished", "time": "t", **fields})]

    assert names(gate_passed=True) == ["finished"]
    assert names(gate_passed=False, halted=True) == ["halted", "gate_failed", "finished"]


def test_a_start_after_a_death_is_a_restart(tmp_path: Path) -> None:
    """Each death is told once: by the supervisor's warning where there is one, else by the start that follows."""
    with EventWriter(tmp_path / "logs" / "events.jsonl") as events:
        events.write("run_started", pid=1)
        events.write("stopped", signal=15)
        events.write("run_started", pid=2)
        events.write("run_started", pid=3)
        events.write("warning", code="restart", message="killed by signal 9")
        events.write("run_started", pid=4)
        events.write("failed", message="x")
        events.write("run_started", pid=5)
    history = read_history(tmp_path / "logs" / "events.jsonl")
    assert [event.get("pid") or event["code"] for event in history.restarts] == [3, "restart"]
    alerts = [alert for event in history.restarts for alert in alerts_of_event(event, is_restart=True)]
    assert [(alert.name, alert.level) for alert in alerts] == [("restart", "WARNING")] * 2


def _keys(*events: dict[str, Any], run_id: str = "r1") -> list[str]:
    return [alert.key for event in events for alert in alerts_of_event(event, run_id=run_id)]


def test_what_a_kill_lets_happen_again_has_the_same_key() -> None:
    """The steps since the checkpoint are repeated: the verdict comes at another time, and is the same news."""
    events = [
        {"kind": "verdict", "stage": "distil", "attempt": 1, "step": 700, "verdict": "degraded", "action": "roll_back"},
        {"kind": "rollback", "stage": "distil", "attempt": 1, "step": 700, "rollback_number": 1},
        {"kind": "resumed", "stage": "distil", "attempt": 1, "step": 600, "exact": False},
        {"kind": "warning", "code": "disk_full", "stage": "distil", "attempt": 1, "step": 700, "message": "x"},
    ]
    first, second = (_keys(*({"time": time} | event for event in events)) for time in ("t1", "t2"))
    assert first == second
    assert first == [
        "degradation/r1/distil/1/700", "rollback/r1/distil/1", "inexact_resume/r1/distil/1/600",
        "disk_full/r1/distil/1/700",
    ]  # fmt: skip
    later = _keys(events[0] | {"attempt": 2}, events[0] | {"stage": "teacher"}, events[1] | {"rollback_number": 2})
    assert not {*later} & {*first} and len({*later}) == 3
    assert not {*_keys(*events, run_id="r2")} & {*first}


def test_a_halt_is_told_once(tmp_path: Path) -> None:
    """By the verdict that asks for it, and not again at the end of the run."""
    (tmp_path / "monitor").mkdir()
    book = AlertBook(tmp_path / "monitor" / "alerts.log")
    events: list[dict[str, Any]] = [
        {"kind": "verdict", "time": "t1", "step": 900, "verdict": "degraded", "action": "halt"},
        {"kind": "run_finished", "time": "t2", "halted": True, "gate_passed": True},
        {"kind": "run_finished", "time": "t3", "halted": True, "gate_passed": True},
    ]
    told = [book.tell(alerts_of_event(event, run_id="r1")) for event in events]
    assert [[alert.name for alert in alerts] for alerts in told] == [["degradation", "halted"], ["finished"], []]


def test_a_run_that_left_since_its_supervisor_died_is_critical(make_run: Callable[..., Path]) -> None:
    """Told once, by the event or, to a monitor that comes later, by the state."""
    root = make_run(until="distil")
    with EventWriter(root / "logs" / "events.jsonl") as events:
        events.write("stopped", signal=15, reason="the supervisor is gone")
    *_, event = read_events(root / "logs" / "events.jsonl")
    (alert,) = alerts_of_event(event, run_id="r-20260301")
    assert (alert.name, alert.level) == ("supervisor_gone", "CRITICAL")
    assert alert.message == "stopped by signal 15: the supervisor is gone"
    (same,) = alerts_of_status(read_status(root))
    assert (same.key, same.level) == (alert.key, "CRITICAL")
    assert "the supervisor died" in same.message
    assert alerts_of_event(event | {"reason": "a request in control.json"}) == []


def test_a_low_disk_is_told_each_time_that_it_becomes_low(tmp_path: Path) -> None:
    (tmp_path / "monitor").mkdir()
    path = tmp_path / "monitor" / "alerts.log"

    def look(book: AlertBook, disk: LowDisk, free: int) -> int:
        health = [{"code": "low_disk", "message": "make room"}] if free < 100 else []
        unknown = dict.fromkeys(("started_at", "pid", "step", "stage", "attempt", "run_id", "result"))
        status = unknown | {"disk_free_bytes": free, "disk_advised_bytes": 100, "health": health}
        return len(book.tell(alerts_of_status(status, disk.look(status))))

    book = AlertBook(path)
    disk = LowDisk(book)
    # Low; on the brink, where a save comes and goes; with room; low again.
    assert [look(book, disk, free) for free in (300, 90, 90, 120, 90, 200, 120)] == [0, 1, 0, 0, 0, 0, 0]
    time.sleep(0.002)
    assert [look(book, disk, free) for free in (90, 90)] == [1, 0]
    again = AlertBook(path)
    disk = LowDisk(again)
    assert [look(again, disk, free) for free in (90, 120, 90)] == [0, 0, 0]
    assert len(path.read_text().splitlines()) == 2


def test_a_disk_that_is_full_costs_the_log_and_not_the_alert(tmp_path: Path) -> None:
    (tmp_path / "monitor").write_text("in the way")
    book = AlertBook(tmp_path / "monitor" / "alerts.log")
    alerts = alerts_of_event({"kind": "failed", "time": "t", "message": "m"})
    assert book.tell(alerts) == alerts and book.tell(alerts) == []


def test_each_is_told_once(make_run: Callable[..., Path]) -> None:
    root = make_run(until="distil")
    path = root / "monitor" / "alerts.log"
    alerts = [alert for event in read_events(root / "logs" / "events.jsonl") for alert in alerts_of_event(event)]
    alerts += alerts_of_status(read_status(root))
    assert [alert.name for alert in alerts] == ["degradation", "rollback", "dead_process"]
    book = AlertBook(path)
    assert len(book.tell(alerts + alerts)) == 3
    assert book.tell(alerts) == []
    assert AlertBook(path).tell([*alerts, *alerts_of_status(read_status(root))]) == []
    assert len(path.read_text().splitlines()) == 3


def test_a_dead_process_after_a_resume_is_news(make_run: Callable[..., Path]) -> None:
    root = make_run(until="distil")
    book = AlertBook(root / "monitor" / "alerts.log")
    assert len(book.tell(alerts_of_status(read_status(root)))) == 1
    with open(root / "logs" / "events.jsonl", "a") as stream:
        stream.write('{"kind": "run_started", "time": "2026-03-02T08:00:00+00:00", "pid": 77, "step": null}\n')
    assert len(book.tell(alerts_of_status(read_status(root)))) == 1
    assert read_history(root / "logs" / "events.jsonl").lifecycle == {
        "kind": "run_started", "time": "2026-03-02T08:00:00+00:00", "pid": 77, "step": None,
    }  # fmt: skip


def test_the_log_is_one_printable_line_an_alert(make_run: Callable[..., Path]) -> None:
    root = make_run()
    event = {"kind": "failed", "time": "a b\nc", "message": "x\ny\x1b[0m: z"}
    AlertBook(root / "monitor" / "alerts.log").tell(alerts_of_event(event))
    (line,) = (root / "monitor" / "alerts.log").read_text().splitlines()
    assert line == "a_b\\nc CRITICAL failed/a_b\\nc: failed: x\\ny\\x1b[0m: z"
    assert AlertBook(root / "monitor" / "alerts.log").tell(alerts_of_event(event)) == []


def test_no_folder_is_made_for_a_run_that_is_gone(tmp_path: Path) -> None:
    book = AlertBook(tmp_path / "gone" / "monitor" / "alerts.log")
    assert len(book.tell(alerts_of_event({"kind": "failed", "time": "t", "message": "m"}))) == 1
    assert not (tmp_path / "gone").exists()
