"""Kills and stops at chosen places, with real validations: within a step, within a validation, at an epoch's edges."""

from __future__ import annotations

import itertools
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.reliability.small_training import describe_state
from cvm_translator.checkpoints.store import CheckpointStore
from cvm_translator.errors import Stopped
from cvm_translator.runs import control
from cvm_translator.runs.control import submit
from cvm_translator.training.state import LoopState

UNGUARDED: dict[str, Any] = {"guard": {"enabled": False}}
"""Whatever the verdicts are, there are 4 validations, of 3 batches each."""
DEGRADED = {(1, 10): "degraded"}


class Crash(BaseException):
    """Ends a loop at a chosen place, as a kill would: nothing in the program catches it."""


def newest(folder: Path) -> dict[str, Any]:
    loaded = CheckpointStore(folder / "checkpoints", report=print).load_newest_valid()
    assert loaded is not None
    return describe_state(loaded)


def on_call(number: int, act: Callable[[], object]) -> Callable[..., None]:
    """Does something when it is called for the so-manieth time."""
    calls = itertools.count(1)

    def call(*_: Any) -> None:
        if next(calls) == number:
            act()

    return call


def crash() -> None:
    raise Crash


def crash_in_objective(loop: Any, call: int) -> None:
    """Within the forward pass of the so-manieth micro-batch."""
    original, note = loop.setup.objective, on_call(call, crash)

    def objective(*arguments: Any) -> Any:
        note()
        return original(*arguments)

    loop.setup.objective = objective


def assert_as_whole(bench: Any, outcome: Any, expected: Any) -> None:
    """As if nothing had happened: every loss, every verdict, the state, and every bit of the newest checkpoint."""
    told = [
        {(e["attempt"], e["step"], e["verdict"], e["reason"]) for e in bench.events("verdict", folder=folder)}
        for folder in ("run", "whole")
    ]
    assert told[0] == told[1]
    assert bench.losses() == bench.losses("whole")
    assert outcome.state == expected.state
    assert newest(bench.folder / "run") == newest(bench.folder / "whole")
    assert all(event["exact"] for event in bench.events("resumed"))


def run_real(bench: Any, folder: str = "run", **options: Any) -> Any:
    loop = bench.build(folder=folder, **UNGUARDED, **options)
    bench.use_real_judge(loop)
    outcome = loop.run()
    loop.setup.events.flush()
    return outcome


# -------------------------------------------------------------------------------------------------------------- kills


@pytest.mark.parametrize(
    ("call", "options"),
    [
        pytest.param(14, {"grad_accum_steps": 2}, id="second micro-batch of step 7"),
        pytest.param(11, {}, id="last batch of an epoch"),
        pytest.param(12, {}, id="first batch of the next epoch"),
        pytest.param(12, {"checkpoint_every_steps": 11}, id="saved after the last batch of an epoch"),
        pytest.param(13, {"checkpoint_every_steps": 12}, id="saved after the first batch of an epoch"),
    ],
)
def test_a_kill_within_a_step(call: int, options: dict[str, Any], bench: Any) -> None:
    """Of 90 pairs an epoch has 11 batches of 8."""
    expected = bench.run(folder="whole", **options)
    loop = bench.build(**options)
    assert loop.setup.batches.num_batches_per_epoch == 11
    crash_in_objective(loop, call)
    with pytest.raises(Crash):
        loop.run()
    loop.setup.events._buffer.clear()
    assert_as_whole(bench, bench.run(**options), expected)
    if "checkpoint_every_steps" in options:
        assert [e["step"] for e in bench.events("resumed")] == [options["checkpoint_every_steps"]]


@pytest.mark.parametrize("batch", [2, 6, 12])
def test_a_kill_within_a_validation(batch: int, bench: Any) -> None:
    """In the middle of the first validation, at the end of the second, at the end of the last."""
    expected = run_real(bench, "whole")
    loop = bench.build(**UNGUARDED)
    bench.use_real_judge(loop, on_call(batch, crash))
    with pytest.raises(Crash):
        loop.run()
    loop.setup.events._buffer.clear()
    assert len(bench.events("validation")) == (batch - 1) // 3
    assert_as_whole(bench, run_real(bench), expected)


# -------------------------------------------------------------------------------------------------------------- stops


def start_and_stop(bench: Any, batch: int) -> None:
    """Ask a loop with real validations to stop before the so-manieth batch that it decodes; it leaves at once."""
    loop = bench.build(**UNGUARDED)
    note, stop = on_call(batch, lambda: stop.request(signal.SIGTERM)), loop.setup.stop
    num_batches = 0

    def beat() -> None:
        nonlocal num_batches
        num_batches += 1
        note()
        stop.raise_if_requested()

    bench.use_real_judge(loop, beat)
    with pytest.raises(Stopped) as stopped:
        loop.run()
    loop.setup.events.flush()
    assert (stopped.value.exit_code, stopped.value.is_saved) == (143, True)
    assert num_batches == batch


@pytest.mark.parametrize("batch", [1, 5, 12])
def test_a_stop_leaves_a_validation_and_the_resume_makes_it(batch: int, bench: Any) -> None:
    """In the first validation, the second, and that of the last step."""
    expected = run_real(bench, "whole")
    start_and_stop(bench, batch)
    step = 5 * ((batch + 2) // 3)
    assert bench.events("checkpoint")[-1]["step"] == step
    assert step not in [e["step"] for e in bench.events("validation")]
    assert newest(bench.folder / "run")["plain"]["loop"]["is_unjudged"]
    assert_as_whole(bench, run_real(bench), expected)
    assert [e["step"] for e in bench.events("resumed")] == [step]
    assert [e["step"] for e in bench.events("validation")] == [5, 10, 15, 20]


def test_the_validation_of_a_resumed_loop_can_be_left_as_well(bench: Any) -> None:
    expected = run_real(bench, "whole")
    start_and_stop(bench, 5)
    start_and_stop(bench, 2)
    assert_as_whole(bench, run_real(bench), expected)
    assert [e["step"] for e in bench.events("resumed")] == [10, 10]


@pytest.mark.parametrize("script", [{}, DEGRADED], ids=["kept", "rolled_back"])
def test_what_a_validation_that_was_left_had_changed_is_taken_back(script: dict[Any, str], bench: Any) -> None:
    """It counts once, and so does a rollback that it asks for."""
    expected = bench.run(script, folder="whole")
    loop = bench.build(script)
    original = loop.setup.judge.judge

    def judge(state: LoopState, model: Any, bits: int) -> Any:
        judgement = original(state, model, bits)
        if state.step == 10:
            loop.setup.stop.request(signal.SIGTERM)
            loop.setup.stop.raise_if_requested()
        return judgement

    loop.setup.judge.judge = judge
    with pytest.raises(Stopped):
        loop.run()
    loop.setup.events.flush()
    assert bench.events("rollback") == []
    assert_as_whole(bench, bench.run(script), expected)
    assert len(bench.events("rollback")) == len(script)


def test_a_validation_for_the_record_is_left_for_a_stop(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "LOOK_EVERY_SECONDS", 0.0)
    expected = bench.run(folder="whole")
    loop = bench.build()
    submit(bench.folder / "run/control.json", "validate")

    def observe(*_: Any) -> None:
        loop.setup.stop.request(signal.SIGTERM)
        loop.setup.stop.raise_if_requested()

    loop.setup.judge.observe = observe
    with pytest.raises(Stopped) as stopped:
        loop.run()
    loop.setup.events.flush()
    assert stopped.value.is_saved
    (answer,) = bench.events("control")
    assert (answer["result"], answer["step"]) == ("failed", 1)
    assert bench.events("checkpoint")[-1]["step"] == 1
    loop = bench.build()
    assert loop.setup.control.begin(bench.folder / "run/events.jsonl", is_restart=True) == []
    outcome = loop.run()
    loop.setup.events.flush()
    assert_as_whole(bench, outcome, expected)


def test_a_budget_that_was_used_up_before_a_kill_stays_used_up(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the save of the last step that the budget allows and the halt."""
    script = {(attempt, 10): "degraded" for attempt in range(1, 5)}
    options: dict[str, Any] = {"guard": {"max_step_budget_ratio": 1.1}, "checkpoint_every_steps": 1}
    expected = bench.run(script, folder="whole", **options)
    assert expected.state.executed_steps == 22
    loop = bench.build(script, **options)
    original = loop._halt_at_budget

    def halt() -> None:
        if loop.state.executed_steps == 22:
            raise Crash
        original()

    monkeypatch.setattr(loop, "_halt_at_budget", halt)
    with pytest.raises(Crash):
        loop.run()
    loop.setup.events.flush()
    assert_as_whole(bench, bench.run(script, **options), expected)


def test_a_state_of_a_version_without_the_mark_is_judged() -> None:
    plain = LoopState(step=5).to_plain()
    del plain["is_unjudged"]
    assert LoopState.from_plain(plain) == LoopState(step=5)
