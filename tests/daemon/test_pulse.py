"""When a trainer counts as hung: by what it was doing, in the supervisor's own time."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from cvm_translator.daemon.pulse import Patience, Pulse
from cvm_translator.runs.heartbeat import Beat


class Bench:
    """A pulse on a real pipe, with a clock that the test turns."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr("cvm_translator.daemon.pulse.time.monotonic", lambda: self.now)
        self.read, self.write = os.pipe()
        os.set_blocking(self.read, False)
        self.pulse = Pulse(self.read, Patience(), tick_seconds=1.0)

    def pass_time(self, seconds: float) -> None:
        """The supervisor looks once a second."""
        for _ in range(round(seconds)):
            self.now += 1.0
            self.pulse.read()

    def beat(self, phase: str, step: int = 0, stage: str = "distil", after: float = 0.0) -> None:
        self.pass_time(after)
        os.write(self.write, Beat(phase, stage, step, 1).line())
        self.pulse.read()


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    built = Bench(monkeypatch)
    yield built
    os.close(built.read)
    os.close(built.write)


def test_twice_the_slowest_step_with_a_floor(bench: Bench) -> None:
    bench.beat("step", 0)
    assert bench.pulse.allowance_seconds() == 600.0  # nothing is known yet
    bench.beat("step", 1, after=3)
    assert bench.pulse.allowance_seconds() == 60.0
    bench.beat("step", 2, after=50)
    bench.beat("step", 3, after=3)
    assert bench.pulse.allowance_seconds() == pytest.approx(100.0)
    bench.pass_time(99)
    assert not bench.pulse.is_hung()
    bench.pass_time(3)
    assert bench.pulse.is_hung()


def test_other_work_is_no_step(bench: Bench) -> None:
    bench.beat("step", 0)
    bench.beat("step", 1, after=2)
    bench.beat("validation", 1, after=2)
    bench.beat("validation", 1, after=500)
    assert not bench.pulse.is_hung()
    bench.beat("save", 1, after=300)
    bench.beat("step", 1, after=400)
    bench.beat("step", 2, after=2)
    assert bench.pulse.allowance_seconds() == 60.0


def test_another_stage_has_its_own_speed(bench: Bench) -> None:
    bench.beat("step", 0, "teacher")
    bench.beat("step", 1, "teacher", after=200)
    assert bench.pulse.allowance_seconds() == pytest.approx(400.0)
    bench.beat("stage", 0, "distil")
    bench.beat("step", 0, "distil", after=5)
    assert bench.pulse.allowance_seconds() == 600.0


def test_a_machine_that_slept_has_not_hung(bench: Bench) -> None:
    bench.beat("step", 0)
    bench.beat("step", 1, after=1)
    bench.now += 10_000.0
    bench.pulse.read()
    assert not bench.pulse.is_hung()


def test_beats_that_were_read_together_share_their_time(bench: Bench) -> None:
    bench.beat("step", 0)
    bench.pass_time(4)
    os.write(bench.write, b"".join(Beat("step", "distil", step, 1).line() for step in range(1, 5)))
    bench.pulse.read()
    assert bench.pulse.slowest_step_seconds == pytest.approx(1.0)


def test_torn_lines_are_put_together_and_a_closed_pipe_is_let_go(bench: Bench) -> None:
    line = Beat("step", "distil", 7, 1).line()
    os.write(bench.write, line[:5])
    bench.pulse.read()
    assert bench.pulse.beat is None
    os.write(bench.write, line[5:] + b"x" * 5000)
    bench.pulse.read()
    assert bench.pulse.beat == Beat("step", "distil", 7, 1)
    with open(os.devnull, "wb") as other:
        os.dup2(other.fileno(), bench.write)  # closes the writing end
    bench.pulse.read()
    assert bench.pulse.descriptor is None
