"""Crashes at every place, stops, damage and full disks: the loop goes on bit for bit, or says what to do."""

from __future__ import annotations

import errno
import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cvm_translator.checkpoints.folder import DiskFullError
from cvm_translator.checkpoints.store import CheckpointStore
from cvm_translator.errors import CheckpointError, Stopped
from cvm_translator.training import room
from cvm_translator.training.signals import StopRequest
from cvm_translator.training.state import LoopState

DEGRADED = {(1, 10): "degraded"}
NAN = [{"kind": "nan_loss", "from_step": 7, "num_steps": 3}]


class Crash(BaseException):
    """Ends a loop at a chosen place, as a kill would: nothing in the program catches it."""


def crash_after(owner: Any, method: str, count: int, monkeypatch: pytest.MonkeyPatch, *, before: bool = False) -> None:
    """Let the `count`-th call of a method of the real object be the last thing that happens."""
    original, calls = getattr(owner, method), [0]

    def wrapper(*arguments: Any, **options: Any) -> Any:
        calls[0] += 1
        if before and calls[0] == count:
            raise Crash
        result = original(*arguments, **options)
        if calls[0] == count:
            raise Crash
        return result

    monkeypatch.setattr(owner, method, wrapper)


Place = tuple[Callable[[Any], Any], str, int, bool]
"""What finds an object in a loop, its method, which call of it is the last, and whether it is not even made."""


def run_through_crashes(
    bench: Any, places: list[Place], options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> tuple[Any, int]:
    """Start again and again, with a crash at one place after the other; the outcome, and how many starts it took."""
    outcome, starts = None, 0
    while outcome is None:
        loop = bench.build(**options)
        with monkeypatch.context() as patch:
            if starts < len(places):
                find, method, count, before = places[starts]
                crash_after(find(loop), method, count, patch, before=before)
            starts += 1
            try:
                outcome = loop.run()
            except Crash:
                loop.setup.events._buffer.clear()  # a killed process takes them with it
            finally:
                loop.setup.events.flush()
    return outcome, starts


def ask_to_stop_after(loop: Any, step: int) -> None:
    """SIGTERM comes while the loop makes a step."""
    original = loop._step

    def make_step() -> Any:
        if loop.state.step + 1 == step:
            loop.setup.stop.request(signal.SIGTERM)
        return original()

    loop._step = make_step


def newest(folder: Path) -> dict[str, Any]:
    """The whole state at the end: weights, moments, random generators, window, judge, place in the data."""
    loaded = CheckpointStore(folder / "checkpoints", report=print).load_newest_valid()
    assert loaded is not None
    return {"tensors": loaded.tensors, "torch_states": loaded.torch_states, "plain": loaded.plain}


def assert_same_state(left: Any, right: Any, place: str = "state") -> None:
    if isinstance(left, dict):
        assert left.keys() == right.keys(), place
        for key in left:
            assert_same_state(left[key], right[key], f"{place}.{key}")
    elif isinstance(left, torch.Tensor):
        assert torch.equal(left, right), place
    elif isinstance(left, list | tuple):
        assert len(left) == len(right), place
        for index, (ours, theirs) in enumerate(zip(left, right, strict=True)):
            assert_same_state(ours, theirs, f"{place}[{index}]")
    else:
        assert left == right, place


def flip_a_bit(folder: Path) -> None:
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


# ------------------------------------------------------------------------------------------------------ exact resume

OPTIONS: list[dict[str, Any]] = [
    {},
    {"grad_accum_steps": 2, "ema_decay": 0.8, "schedule": "cosine"},
    {"script": DEGRADED},
    {"faults": NAN},
]


@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "accumulated", "rolled_back", "nan"])
def test_crashes_everywhere_change_no_bit(options: dict[str, Any], bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Crash in a step, before and after a save, in a judgement, between decision and rollback: one loss per step."""
    expected = bench.run(folder="whole", **options)
    places: list[Place] = [
        (lambda loop: loop, "_step", 4, False),
        (lambda loop: loop.setup.store, "save", 2, True),
        (lambda loop: loop.setup.store, "save", 2, False),
        (lambda loop: loop.setup.judge, "judge", 1, False),
        (lambda loop: loop.decision, "write", 1, False),
        (lambda loop: loop, "_restore", 2, False),
        (lambda loop: loop, "_step", 6, False),
        (lambda loop: loop.setup.store, "save", 3, False),
    ]
    outcome, starts = run_through_crashes(bench, places, options, monkeypatch)
    assert starts > 4
    losses = bench.losses()
    assert all(len(values) == 1 for values in losses.values())
    assert losses == bench.losses("whole")
    assert outcome.state == expected.state
    assert outcome.final_checkpoint == expected.final_checkpoint
    assert_same_state(bench.weights(outcome), bench.weights(expected, "whole"))
    assert_same_state(newest(bench.folder / "run"), newest(bench.folder / "whole"))
    assert all(event["exact"] for event in bench.events("resumed"))
    rollbacks = {event["rollback_number"]: event["from_step"] for event in bench.events("rollback")}
    assert rollbacks == {
        event["rollback_number"]: event["from_step"] for event in bench.events("rollback", folder="whole")
    }


def test_a_finished_loop_runs_no_step_again(bench: Any) -> None:
    first = bench.run()
    again = bench.run()
    assert again == first
    assert len(bench.events("train")) == 20


def test_an_incomplete_state_is_an_error() -> None:
    plain = LoopState().to_plain()
    del plain["executed_steps"]
    with pytest.raises(KeyError, match="executed_steps"):
        LoopState.from_plain(plain)


def test_another_thread_count_is_announced(bench: Any) -> None:
    bench.run(num_iterations=8)
    loop = bench.build(num_iterations=8)
    torch.set_num_threads(2)
    try:
        loop.run()
    finally:
        torch.set_num_threads(1)
        loop.setup.events.flush()
    (event,) = bench.events("resumed")
    assert (event["exact"], event["differences"]) == (False, ["num_threads: was 1, is 2"])


@pytest.mark.parametrize("at_step", [2, 3, 5])
def test_a_stop_request_saves_at_the_steps_end(at_step: int, bench: Any) -> None:
    """On a step without a save, with one, and with a validation."""
    expected = bench.run(folder="whole")
    loop = bench.build(stop=StopRequest())
    ask_to_stop_after(loop, at_step)
    with pytest.raises(Stopped) as stopped:
        loop.run()
    loop.setup.events.flush()
    assert stopped.value.exit_code == 143
    saved = [event["step"] for event in bench.events("checkpoint")]
    assert saved[-1] == at_step
    assert len(saved) == len(set(saved))
    outcome = bench.run()
    assert outcome.state == expected.state
    assert bench.losses() == bench.losses("whole")


def test_other_micro_batches_are_announced_once(bench: Any) -> None:
    """As after a death for want of memory: no config has changed, the effective batch and its gradient are the same."""
    bench.run(num_iterations=6)
    for _ in range(2):
        bench.build(num_iterations=9, grad_accum_steps=2).run()
        bench.loops[-1].setup.events.flush()
    first, second = bench.events("resumed")
    assert (first["exact"], first["differences"]) == (False, ["grad_accum_steps: was 1, is 2"])
    assert (second["exact"], second["differences"]) == (True, [])


# -------------------------------------------------------------------------------------------- damage and full disks


def test_a_damaged_best_gives_way_to_the_best_before_it(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    script = {(1, 15): "degraded"}
    loop = bench.build(script, num_iterations=15, guard={"max_step_budget_ratio": 2.0})
    original = loop.setup.judge.judge

    def judge(state: LoopState, model: Any, bits: int) -> Any:
        if (state.attempt, state.step) == (1, 15):
            flip_a_bit(bench.folder / "run/checkpoints/checkpoint_10")
        return original(state, model, bits)

    monkeypatch.setattr(loop.setup.judge, "judge", judge)
    loop.setup.store.protect("checkpoint_5")
    outcome = loop.run()
    loop.setup.events.flush()
    (rollback,) = bench.events("rollback")
    assert rollback["to_step"] == 5
    assert outcome.state.rollbacks[0]["to_step"] == 5
    assert (outcome.state.step, outcome.final_checkpoint) == (15, "checkpoint_15.attempt_2")
    (warning,) = bench.events("warning")
    assert "checkpoint_10 is damaged" in warning["message"]
    assert "checkpoint_5 is used in its place" in warning["message"]


def test_a_damaged_only_best_is_an_error_that_says_what_to_do(bench: Any) -> None:
    script = {(1, step): "healthy" for step in (10, 15, 20)}
    bench.run(script)
    flip_a_bit(bench.folder / "run/checkpoints/checkpoint_5")
    with pytest.raises(CheckpointError, match=r"checkpoint_5 is damaged.* no older best .*restore it .*train again"):
        bench.run(script)


def test_a_damaged_newest_checkpoint_costs_only_its_steps(bench: Any) -> None:
    expected = bench.run(folder="whole")
    with pytest.raises(Crash):
        loop = bench.build()
        loop._validate = lambda: (_ for _ in ()).throw(Crash)
        loop.run()
    loop.setup.events.flush()
    flip_a_bit(bench.folder / "run/checkpoints/checkpoint_3")
    outcome = bench.run()
    assert [event["step"] for event in bench.events("resumed")] == [0]
    assert "checkpoint_3 is damaged" in bench.reports[0]
    assert_same_state(bench.weights(outcome), bench.weights(expected, "whole"))
    assert bench.losses() == bench.losses("whole")


def test_no_room_before_the_first_step_is_an_error(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    loop = bench.build()
    monkeypatch.setattr(loop.setup.store, "save", lambda *_, **__: (_ for _ in ()).throw(DiskFullError("no room")))
    with pytest.raises(DiskFullError):
        loop.run()


def test_the_run_pauses_while_the_disk_is_full(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """At a save, at the judge's files and at a rollback's decision: it goes on by itself, and no bit is another."""
    expected = bench.run(DEGRADED, folder="whole")
    monkeypatch.setattr(room, "LOOK_EVERY_SECONDS", 0.001)
    monkeypatch.setattr(room, "RETRY_AFTER_SECONDS", 0.002)
    loop = bench.build(DEGRADED)

    def refuse(owner: Any, method: str, calls_refused: tuple[int, ...]) -> None:
        original, calls = getattr(owner, method), [0]

        def wrapper(*arguments: Any, **options: Any) -> Any:
            calls[0] += 1
            if method != "judge" and calls[0] in calls_refused:
                raise OSError(errno.ENOSPC, "No space left on device")
            result = original(*arguments, **options)
            if calls[0] in calls_refused:
                torch.rand(3)
                raise OSError(errno.ENOSPC, "No space left on device")
            return result

        monkeypatch.setattr(owner, method, wrapper)

    refuse(loop.setup.store, "save", (2, 3, 5))
    refuse(loop.setup.judge, "judge", (1, 2))
    refuse(loop.decision, "write", (1,))
    outcome = loop.run()
    loop.setup.events.flush()
    assert outcome.state == expected.state
    assert bench.losses() == bench.losses("whole")
    assert_same_state(newest(bench.folder / "run"), newest(bench.folder / "whole"))
    warnings = [e for e in bench.events("warning") if e["code"] == "disk_full"]
    assert len(warnings) == len(bench.events("paused")) == len(bench.events("continued")) == 4
    assert "pauses until there is room: " in warnings[0]["message"]


def test_a_run_that_waits_for_room_can_be_stopped(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "LOOK_EVERY_SECONDS", 0.001)
    loop = bench.build()
    loop.save()

    def save(*_: Any, **__: Any) -> Any:
        loop.setup.stop.request(signal.SIGTERM)
        raise DiskFullError("no room for the checkpoint of step 3")

    monkeypatch.setattr(loop.setup.store, "save", save)
    with pytest.raises(Stopped) as stopped:
        loop.run()
    assert not stopped.value.is_saved
    loop.setup.events.flush()
    assert [e["step"] for e in bench.events("paused")] == [3]
    monkeypatch.undo()
    bench.run()
    assert [e["step"] for e in bench.events("resumed")][-1] == 0


def test_a_decision_is_carried_out_by_the_next_start(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process ends after the decision is on disk and before anything was done about it."""
    expected = bench.run(DEGRADED, folder="whole")
    loop = bench.build(DEGRADED)
    crash_after(loop.decision, "write", 1, monkeypatch)
    with pytest.raises(Crash):
        loop.run()
    loop.setup.events._buffer.clear()
    assert bench.events("rollback") == []
    outcome = bench.run(DEGRADED)
    assert outcome.state == expected.state
    assert [e["attempt"] for e in bench.events("verdict") if e["step"] == 10] == [1, 2]  # judged once, not again
    same = ("from_step", "to_step", "rollback_number", "reason", "attempt", "data_stream", "learning_rate_factor")
    (ours,), (theirs,) = bench.events("rollback"), bench.events("rollback", folder="whole")
    assert [ours[name] for name in same] == [theirs[name] for name in same]
    assert bench.losses() == bench.losses("whole")
    assert_same_state(bench.weights(outcome), bench.weights(expected, "whole"))


def test_a_decision_outlives_the_loss_of_what_followed_it(bench: Any) -> None:
    """The rollback was carried out, then its checkpoints were lost: it is carried out again, not forgotten."""
    expected = bench.run(DEGRADED)
    for path in (bench.folder / "run/checkpoints").glob("checkpoint_*.attempt_2"):
        shutil.rmtree(path)
    outcome = bench.run(DEGRADED)
    assert outcome.state == expected.state
    assert json.loads((bench.folder / "run/checkpoints/rollback.json").read_text())["attempt"] == 2
    assert_same_state(bench.weights(outcome), bench.weights(expected))
