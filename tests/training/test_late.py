"""Verdicts that come some steps late: training is the same, and what they decide is decided at the same step."""

from __future__ import annotations

import errno
import signal
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from cvm_translator.checkpoints.store import CheckpointStore
from cvm_translator.errors import Stopped
from cvm_translator.training import room
from cvm_translator.training.signals import StopRequest
from cvm_translator.training.widths import WidthCourse
from cvm_translator.validation import DistillationValidator
from cvm_translator.validation.scoring import ScoringFailed, ScoringProcess
from tests.training.test_loop_resume import (
    DEGRADED,
    NAN,
    Place,
    ask_to_stop_after,
    assert_same_state,
    flip_a_bit,
    newest,
    run_through_crashes,
)

DELAY = 3
"""Steps from a validation (every fifth step) to its verdict."""
COURSE = WidthCourse((16, 8, 4))
ROLLED_BACK: dict[str, Any] = {"script": DEGRADED, "guard": {"max_step_budget_ratio": 2.0}}


@pytest.fixture(autouse=True)
def _verdicts_come_three_steps_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cvm_translator.training.late.DUE_AFTER", DELAY / 5)


def load(bench: Any, folder: str, name: str) -> Any:
    return CheckpointStore(bench.folder / folder / "checkpoints", report=print).load(name)


def verdicts_with_steps(bench: Any, folder: str = "run") -> list[tuple[int, int]]:
    """Of each verdict the step it is about, and the newest step that had been trained when it came."""
    newest_step, found = 0, []
    for event in bench.events("train", "verdict", "rollback", folder=folder):
        if event["kind"] == "train":
            newest_step = event["step"]
        elif event["kind"] == "verdict":
            found.append((event["step"], newest_step))
    return found


def test_training_goes_on_meanwhile_and_is_the_same(bench: Any) -> None:
    at_once = bench.run(folder="whole")
    loop = bench.build(is_late=True)
    outcome = loop.run()
    loop.setup.events.flush()
    assert bench.losses() == bench.losses("whole")
    assert outcome == at_once
    assert_same_state(newest(bench.folder / "run"), newest(bench.folder / "whole"))
    # the last one waits: nothing is to be done meanwhile
    assert verdicts_with_steps(bench) == [(5, 8), (10, 13), (15, 18), (20, 20)]
    assert [at for _, at in loop.setup.late.concluded] == [5, 10, 15]
    assert loop.setup.late.is_closed


def test_a_best_checkpoint_is_what_it_would_be_at_once(bench: Any) -> None:
    """Bit for bit, the judge's memory and the loop's account of it too: it may be gone back to."""
    options: dict[str, Any] = {"num_iterations": 14, "ema_decay": 0.8}
    bench.run(folder="whole", **options)
    bench.run(is_late=True, **options)
    late, at_once = load(bench, "run", "checkpoint_10"), load(bench, "whole", "checkpoint_10")
    assert late.is_best
    assert at_once.is_best
    assert_same_state(late.plain, at_once.plain)
    assert_same_state(late.tensors, at_once.tensors)
    assert_same_state(late.torch_states, at_once.torch_states)
    told = [(e["step"], e["is_best"]) for e in bench.events("checkpoint") if e["path"] == "checkpoint_10"]
    assert told == [(10, False), (10, True)]


def test_what_is_degraded_is_rolled_back_some_steps_later(bench: Any) -> None:
    loop = bench.build(**ROLLED_BACK, is_late=True)
    outcome = loop.run()
    loop.setup.events.flush()
    (rollback,) = bench.events("rollback")
    assert (rollback["from_step"], rollback["to_step"], rollback["attempt"]) == (13, 5, 1)
    assert outcome.state.executed_steps == 20 + 8
    assert outcome.final_checkpoint == "checkpoint_20.attempt_2"
    (verdict,) = [e for e in bench.events("verdict") if e["action"] == "roll_back"]
    assert (verdict["step"], verdict["best_step"]) == (10, 5)


def test_the_awaited_checkpoint_is_kept(bench: Any) -> None:
    """Although newer ones would push it out: two are kept, and one is saved at each step."""
    loop = bench.build({(1, 9): "healthy"}, num_iterations=9, checkpoint_every_steps=1, is_late=True)
    loop.setup.store.keep = 2
    assert loop.run().final_checkpoint == "checkpoint_5"
    assert load(bench, "run", "checkpoint_5").is_best


OPTIONS: list[dict[str, Any]] = [
    {"ema_decay": 0.8},
    ROLLED_BACK,
    {"faults": NAN},
    {"widths": COURSE},
    {"script": DEGRADED, "guard": {"max_rollbacks": 0}},
]


@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "rolled_back", "nan", "widths", "halted"])
def test_crashes_everywhere_change_no_bit(options: dict[str, Any], bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = bench.run(folder="whole", is_late=True, **options)
    places: list[Place] = [
        (lambda loop: loop.setup.late, "translate", 1, False),
        (lambda loop: loop.setup.late, "begin_scoring", 1, False),
        (lambda loop: loop, "_step", 7, False),  # with a verdict on its way
        (lambda loop: loop.setup.late, "conclude", 1, True),
        (lambda loop: loop.setup.late, "conclude", 1, False),
        (lambda loop: loop.setup.store, "amend", 1, True),
        (lambda loop: loop.setup.store, "amend", 1, False),
        (lambda loop: loop.setup.store, "_commit", 3, True),
        (lambda loop: loop.decision, "write", 1, False),
        (lambda loop: loop.setup.late, "conclude", 2, True),
        (lambda loop: loop, "_restore", 2, False),
        (lambda loop: loop.setup.store, "save", 3, False),
        (lambda loop: loop.setup.store, "amend", 1, False),
    ]
    outcome, starts = run_through_crashes(bench, places, options | {"is_late": True}, monkeypatch)
    assert starts > 5
    losses = bench.losses()
    assert all(len(values) == 1 for values in losses.values())
    assert losses == bench.losses("whole")
    assert outcome == expected
    assert_same_state(newest(bench.folder / "run"), newest(bench.folder / "whole"))
    assert all(event["exact"] for event in bench.events("resumed"))


@pytest.mark.parametrize("place", ["a step", "the waiting"])
def test_a_stop_leaves_the_verdict_for_the_resume(bench: Any, place: str) -> None:
    expected = bench.run(**ROLLED_BACK, folder="whole", is_late=True)
    loop = bench.build(**ROLLED_BACK, is_late=True, stop=StopRequest())
    if place == "a step":
        ask_to_stop_after(loop, 12)
    else:
        conclude = loop.setup.late.conclude

        def wait(step: int, *rest: Any) -> Any:
            if step == 10:
                raise Stopped(signal.SIGTERM)
            return conclude(step, *rest)

        loop.setup.late.conclude = wait
    with pytest.raises(Stopped) as stopped:
        loop.run()
    assert stopped.value.is_saved
    loop.setup.events.flush()
    assert loop.setup.late.is_closed
    saved_at = 12 if place == "a step" else 13
    assert load(bench, "run", "latest").step == saved_at
    assert load(bench, "run", "latest").plain["loop"]["pending"]["step"] == 10
    assert bench.run(**ROLLED_BACK, is_late=True) == expected
    assert bench.losses() == bench.losses("whole")


def test_a_run_that_now_scores_at_once_concludes_what_is_left(bench: Any) -> None:
    loop = bench.build(**ROLLED_BACK, is_late=True, stop=StopRequest())
    ask_to_stop_after(loop, 11)
    with pytest.raises(Stopped):
        loop.run()
    loop.setup.events.flush()
    outcome = bench.run(**ROLLED_BACK)
    assert [event["from_step"] for event in bench.events("rollback")] == [13]
    assert outcome.final_checkpoint == "checkpoint_20.attempt_2"


def test_an_emergency_asks_for_the_verdict_first(bench: Any) -> None:
    """Three NaN losses at steps that follow a validation: what it found is the best is what is gone back to."""
    loop = bench.build(faults=[{"kind": "nan_loss", "from_step": 11, "num_steps": 3}], is_late=True)
    outcome = loop.run()
    loop.setup.events.flush()
    (rollback,) = bench.events("rollback")
    assert (rollback["from_step"], rollback["to_step"]) == (10, 10)
    assert outcome.state.step == 20


def test_an_emergency_gives_way_to_the_verdict_s_own_rollback(bench: Any) -> None:
    faults = [{"kind": "nan_loss", "from_step": 11, "num_steps": 3}]
    loop = bench.build(DEGRADED, faults=faults, is_late=True, guard={"max_step_budget_ratio": 2.0})
    loop.run()
    loop.setup.events.flush()
    (rollback,) = bench.events("rollback")
    assert (rollback["to_step"], rollback["reason"]) == (5, "it is degraded")


def test_the_step_budget_ends_after_the_verdict(bench: Any) -> None:
    """Used up while a verdict is on its way, whose validation is the best one: it is delivered."""
    script = {(1, 15): "degraded"}
    loop = bench.build(script, is_late=True, guard={"max_step_budget_ratio": 1.25})
    outcome = loop.run()  # 18 steps to the verdict on step 15, then 7 of the 10 from step 10 on
    assert outcome.halted == "the step budget is used up (25 steps executed)"
    assert outcome.state.step == 17  # a step before the verdict on the second step 15 is due
    assert outcome.final_checkpoint == "checkpoint_15.attempt_2"


def test_patience_ends_some_steps_later(bench: Any) -> None:
    script = {(1, 10): "healthy", (1, 15): "healthy"}
    loop = bench.build(script, is_late=True, guard={"early_stopping_validations": 2})
    outcome = loop.run()
    assert (outcome.state.step, outcome.final_checkpoint) == (18, "checkpoint_5")
    assert outcome.halted == "no new best in 2 validations"
    assert bench.run(script, is_late=True, guard={"early_stopping_validations": 2}) == outcome


def test_a_width_falls_at_the_verdict(bench: Any) -> None:
    loop = bench.build(widths=COURSE, is_late=True)
    outcome = loop.run()
    assert loop.setup.judge.widths == [16, 8, 4, 4]
    assert loop.state.held == {"checkpoint": "checkpoint_10", "bits": 8}
    assert (outcome.bits, outcome.final_checkpoint) == (4, "checkpoint_20")
    load(bench, "run", "checkpoint_10")  # held, so kept


def test_a_damaged_checkpoint_does_not_become_the_best(bench: Any) -> None:
    loop = bench.build({(1, 15): "degraded"}, is_late=True, guard={"max_step_budget_ratio": 2.0})
    original = loop.setup.late.conclude

    def conclude(step: int, attempt: int, translated: Any) -> Any:
        if (attempt, step) == (1, 10):
            flip_a_bit(bench.folder / "run/checkpoints/checkpoint_10")
        return original(step, attempt, translated)

    loop.setup.late.conclude = conclude
    loop.setup.store.protect("checkpoint_5")
    loop.run()
    loop.setup.events.flush()
    assert [e["to_step"] for e in bench.events("rollback")] == [5]
    assert "checkpoint_10 is damaged" in bench.events("warning")[0]["message"]


def test_the_run_pauses_while_there_is_no_room(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """For the judge's files, and for the best checkpoint's new state."""
    expected = bench.run(**ROLLED_BACK, folder="whole", is_late=True)
    monkeypatch.setattr(room, "LOOK_EVERY_SECONDS", 0.001)
    monkeypatch.setattr(room, "RETRY_AFTER_SECONDS", 0.002)
    loop = bench.build(**ROLLED_BACK, is_late=True)

    def refuse_once(owner: Any, method: str) -> None:
        original, calls = getattr(owner, method), [0]

        def wrapper(*arguments: Any, **options: Any) -> Any:
            calls[0] += 1
            result = original(*arguments, **options)
            if calls[0] == 1:
                if method == "conclude":
                    torch.rand(3)
                raise OSError(errno.ENOSPC, "No space left on device")
            return result

        monkeypatch.setattr(owner, method, wrapper)

    refuse_once(loop.setup.late, "conclude")
    refuse_once(loop.setup.store, "amend")
    outcome = loop.run()
    loop.setup.events.flush()
    assert outcome == expected
    assert bench.losses() == bench.losses("whole")
    assert_same_state(newest(bench.folder / "run"), newest(bench.folder / "whole"))
    assert len(bench.events("paused")) == len(bench.events("continued")) == 2


# -------------------------------------------------------------------------------------- real translations and scores

TOLD = ("step", "scores", "quality_score", "retentions", "probes")


def start_process(validator: DistillationValidator) -> ScoringProcess:
    return ScoringProcess(validator.config, validator.sources, validator.references, num_threads=1)


@dataclass
class BrokenProcess:
    """Loses each of its processes."""

    is_busy: bool = False

    def submit(self, hypotheses: list[str]) -> None:
        self.is_busy = True

    def collect(self, on_wait: Callable[[], object]) -> Any:
        self.is_busy = False
        raise ScoringFailed("the process was killed")

    def close(self) -> None:
        pass


@pytest.mark.parametrize("build_scoring", [start_process, lambda _: BrokenProcess()], ids=["process", "killed"])
def test_scores_are_those_that_are_computed_at_once(bench: Any, build_scoring: Any) -> None:
    """And so are the verdicts and the records on disk, whether the process lives or not."""
    at_once = bench.build(folder="whole")
    bench.use_real_judge(at_once)
    expected = at_once.run()
    late = bench.build()
    bench.use_real_judge(late, build_scoring=build_scoring)
    assert late.run() == expected
    for loop in (at_once, late):
        loop.setup.events.flush()
    assert bench.losses() == bench.losses("whole")

    def told(kind: str, names: tuple[str, ...], folder: str = "run") -> list[Any]:
        return [[event[name] for name in names] for event in bench.events(kind, folder=folder)]

    assert told("validation", TOLD) == told("validation", TOLD, "whole")
    assert told("verdict", ("step", "verdict", "best_step")) == told(
        "verdict", ("step", "verdict", "best_step"), "whole"
    )
    for path in sorted((bench.folder / "whole" / "validation").glob("*.npz")):
        assert path.read_bytes() == (bench.folder / "run" / "validation" / path.name).read_bytes()
    codes = [event["code"] for event in bench.events("warning")]
    assert codes.count("scoring_process") == (3 if build_scoring is not start_process else 0)
    assert [event["step"] for event in bench.events("validation")] == [5, 10, 15, 20]
    assert verdicts_with_steps(bench)[0] == (5, 8)
