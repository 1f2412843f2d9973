"""The loop while the bit width falls: only after held quality, with a new best at each width, and resumed exactly."""

from __future__ import annotations

from typing import Any

import pytest

from cvm_translator.errors import Stopped
from cvm_translator.training.signals import StopRequest
from cvm_translator.training.widths import UNROUNDED_BITS, WidthCourse

COURSE = WidthCourse((16, 8, 4))


def test_the_width_falls_after_each_validation_that_held(bench: Any) -> None:
    loop = bench.build(widths=COURSE)
    seen: dict[int, int] = {}
    original = loop.setup.prepare

    def watch(model: Any, bits: int) -> None:
        seen[loop.state.step + 1] = bits
        original(model, bits)

    loop.setup.prepare = watch
    outcome = loop.run()
    assert [seen[step] for step in range(1, 21)] == [16] * 5 + [8] * 5 + [4] * 10
    assert loop.setup.judge.widths == [16, 8, 4, 4]
    assert [event["bits"] for event in bench.events("verdict")] == [16, 8, 4, 4]
    assert loop.setup.judge.num_started == 2
    assert (outcome.bits, outcome.final_checkpoint) == (4, "checkpoint_20")
    assert loop.state.held == {"checkpoint": "checkpoint_10", "bits": 8}


@pytest.mark.parametrize("verdict", ["held back", "degraded"])
def test_a_width_stays_while_quality_is_not_held(bench: Any, verdict: str) -> None:
    script = {(1, 10): "degraded"} if verdict == "degraded" else {}
    not_held = frozenset({10, 15}) if verdict == "held back" else frozenset()
    loop = bench.build(script, widths=COURSE, not_held=not_held, guard={"max_step_budget_ratio": 3.0})
    outcome = loop.run()
    expected = {"held back": [16, 8, 8, 8], "degraded": [16, 8, 8, 4, 4]}[verdict]
    assert loop.setup.judge.widths == expected
    assert outcome.bits == expected[-1]
    if verdict == "degraded":  # before the width has a best of its own, the step at which it began is the target
        assert [(event["from_step"], event["to_step"]) for event in bench.events("rollback")] == [(10, 5)]


def test_a_last_width_that_was_not_held_is_not_delivered(bench: Any) -> None:
    script = {(1, 15): "first"}
    loop = bench.build(script, widths=COURSE, not_held=frozenset({15, 20}))
    outcome = loop.run()
    assert loop.setup.judge.widths == [16, 8, 4, 4]
    assert (outcome.bits, outcome.final_checkpoint) == (8, "checkpoint_10")
    bench.weights(outcome)  # retention has kept it


def test_no_width_gives_way_before_its_step(bench: Any) -> None:
    loop = bench.build(widths=WidthCourse((16, 8), first_step=12))
    assert loop.run().bits == 8
    assert loop.setup.judge.widths == [16, 16, 16, 8]


def test_a_course_of_falling_widths_resumes_exactly(bench: Any) -> None:
    whole = bench.build(widths=COURSE, folder="whole").run()
    stop = StopRequest()
    first = bench.build(widths=COURSE, folder="cut", stop=stop)
    original = first.setup.judge.start_width

    def start_and_stop() -> None:
        original()
        stop.signal_number = 15

    first.setup.judge.start_width = start_and_stop
    with pytest.raises(Stopped):
        first.run()
    second = bench.build(widths=COURSE, folder="cut")
    resumed = second.run()
    assert resumed.state.to_plain() == whole.state.to_plain()
    assert (resumed.bits, resumed.final_checkpoint) == (whole.bits, whole.final_checkpoint)
    assert bench.losses("cut") == bench.losses("whole")


def test_the_widths_of_a_course() -> None:
    single = WidthCourse((8,), first_step=3)
    assert [single.training_bits(step, 0) for step in (1, 2, 3)] == [UNROUNDED_BITS, UNROUNDED_BITS, 8]
    assert not single.may_narrow(100, 0)
    assert COURSE.may_narrow(1, 1) and not COURSE.may_narrow(1, 2)
