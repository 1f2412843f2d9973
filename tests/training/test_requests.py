"""What observers ask for: obeyed between two steps, answered once, and no loss is another for it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cvm_translator.errors import Stopped
from cvm_translator.runs import control
from cvm_translator.runs.control import submit
from cvm_translator.runs.events import EventTail
from cvm_translator.training import requests


@pytest.fixture(autouse=True)
def _look_each_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "LOOK_EVERY_SECONDS", 0.0)
    monkeypatch.setattr(requests, "PAUSE_LOOK_SECONDS", 0.01)


@pytest.fixture
def expected(bench: Any) -> Any:
    """The losses and the state of a run that nobody asked for anything."""
    outcome = bench.run(folder="whole")
    return bench.losses("whole"), outcome.state


def ask_at(loop: Any, step: int, *actions: str) -> list[str]:
    """File requests while the loop takes a step; their ids appear in the list that is returned."""
    original, ids = loop._step, []

    def take() -> Any:
        result = original()
        if loop.state.step == step:
            ids.extend(submit(loop.setup.control._path, action) for action in actions)
        return result

    loop._step = take
    return ids


def in_thread(bench: Any, is_reached: Callable[[dict[str, Any]], bool], act: Callable[[], object]) -> threading.Thread:
    """Act when the events of the run say so, from another thread, as another process would."""

    def work() -> None:
        tail = EventTail(bench.folder / "run/events.jsonl")
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not any(is_reached(event) for event in tail.poll()):
            time.sleep(0.005)
        tail.close()
        act()

    thread = threading.Thread(target=work)
    thread.start()
    return thread


def is_kind(kind: str) -> Callable[[dict[str, Any]], bool]:
    return lambda event: event["kind"] == kind


def control_path(bench: Any) -> Path:
    return bench.folder / "run/control.json"


def test_a_checkpoint_and_a_validation_for_the_record_change_no_bit(bench: Any, expected: Any) -> None:
    loop = bench.build()
    ids = ask_at(loop, 4, "checkpoint", "validate")
    ask_at(loop, 5, "validate")  # beside the loop's own validation of this step
    outcome = loop.run()
    loop.setup.events.flush()
    assert (bench.losses(), outcome.state) == expected
    answers = bench.events("control")
    assert [e["id"] for e in answers[:2]] == ids
    assert [(e["action"], e["result"], e["step"]) for e in answers] == [
        ("checkpoint", "done", 4),
        ("validate", "done", 4),
        ("validate", "done", 5),
    ]
    assert loop.setup.judge.observed == [[1, 4], [1, 5]]
    assert 4 in [e["step"] for e in bench.events("checkpoint")]


def test_a_pause_lasts_until_somebody_continues(bench: Any, expected: Any) -> None:
    loop = bench.build()
    ask_at(loop, 7, "pause")
    thread = in_thread(
        bench, is_kind("paused"), lambda: [submit(control_path(bench), a) for a in ("pause", "continue")]
    )
    outcome = loop.run()
    thread.join()
    loop.setup.events.flush()
    assert (bench.losses(), outcome.state) == expected
    told = [(e["kind"], e["step"], e.get("action")) for e in bench.events("control", "paused", "continued")]
    assert told == [
        ("control", 7, "pause"),
        ("paused", 7, None),
        ("control", 7, "pause"),
        ("control", 7, "continue"),
        ("continued", 7, None),
    ]
    assert bench.events("control")[1]["message"] == "it was paused already"
    assert 7 in [e["step"] for e in bench.events("checkpoint")]


def test_a_stop_saves_and_leaves_and_is_not_obeyed_again(bench: Any, expected: Any) -> None:
    loop = bench.build()
    ask_at(loop, 7, "stop")
    with pytest.raises(Stopped) as stopped:
        loop.run()
    loop.setup.events.flush()
    assert stopped.value.exit_code == 143
    assert bench.events("checkpoint")[-1]["step"] == 7
    loop = bench.build()
    assert loop.setup.control.begin(bench.folder / "run/events.jsonl", is_restart=True) == []
    outcome = loop.run()
    loop.setup.events.flush()
    assert (bench.losses(), outcome.state) == expected
    assert len(bench.events("control")) == 1


def test_a_paused_run_can_be_stopped(bench: Any) -> None:
    loop = bench.build()
    ask_at(loop, 7, "pause")
    thread = in_thread(bench, is_kind("paused"), loop.setup.stop.request)
    with pytest.raises(Stopped):
        loop.run()
    thread.join()
    assert bench.events("checkpoint")[-1]["step"] == 7


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), OSError(28, "No space left on device")])
def test_a_validation_that_fails_is_answered_and_not_tried_again(error: Exception, bench: Any, expected: Any) -> None:
    loop = bench.build()

    def observe(*_: Any) -> None:
        raise error

    loop.setup.judge.observe = observe
    ask_at(loop, 4, "validate")
    if isinstance(error, OSError):
        outcome = loop.run()
    else:
        with pytest.raises(RuntimeError):
            loop.run()
        loop = bench.build()
        assert loop.setup.control.begin(bench.folder / "run/events.jsonl", is_restart=True) == []
        outcome = loop.run()
    loop.setup.events.flush()
    assert (bench.losses(), outcome.state) == expected
    assert [e["result"] for e in bench.events("control")] == ["failed"]


def test_an_unknown_action_is_answered(bench: Any, expected: Any) -> None:
    loop = bench.build()
    ask_at(loop, 3, "explode")
    outcome = loop.run()
    loop.setup.events.flush()
    assert (bench.losses(), outcome.state) == expected
    (answer,) = bench.events("control")
    assert (answer["result"], answer["action"]) == ("unknown", "explode")
    assert "known actions are pause, continue, checkpoint, validate, stop" in answer["message"]


def test_a_hostile_file_is_a_warning(bench: Any, expected: Any) -> None:
    loop = bench.build()
    control_path(bench).write_text('{"requests": [[[')
    outcome = loop.run()
    loop.setup.events.flush()
    assert (bench.losses(), outcome.state) == expected
    (warning,) = bench.events("warning")
    assert warning["code"] == "control_file"
    assert "control.json is passed over" in warning["message"]
