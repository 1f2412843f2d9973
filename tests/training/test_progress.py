"""The heartbeat: its loss is that of the tokens since the last one, its speed does not jump with the batch lengths."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from cvm_translator.runs.events import EventWriter, read_events
from cvm_translator.training import progress
from cvm_translator.training.state import LoopState
from cvm_translator.training.step import StepResult


def result(loss: float, num_tokens: int, rejected: str | None = None) -> StepResult:
    return StepResult(loss, 0.0, loss, 0.5, 1.0, num_tokens, rejected)


class Clock:
    """Stands in for the time module."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def run(
    tmp_path: Path, clock: Clock, steps: list[tuple[float, StepResult]], peak: float | None = None
) -> list[dict[str, Any]]:
    path = tmp_path / "events.jsonl"
    with EventWriter(path) as events:
        meter = progress.ProgressMeter(events, "distil", num_iterations=1000, peak=peak)
        state = LoopState()
        for seconds, step in steps:
            clock.now += seconds
            state.step += 1
            meter.count(step, state, num_flops=10.0 * step.num_tokens)
    return list(read_events(path))


def test_loss_is_the_mean_over_tokens_since_the_last_report(tmp_path: Path, clock: Clock) -> None:
    steps = [(3.0, result(2.0, 100)), (3.0, result(1.0, 300)), (3.0, result(5.0, 10)), (3.0, result(4.0, 30))]
    first, second = run(tmp_path, clock, steps)
    assert first["loss"] == pytest.approx((2.0 * 100 + 1.0 * 300) / 400)
    assert second["loss"] == pytest.approx((5.0 * 10 + 4.0 * 30) / 40)
    for name in ("distillation_loss", "task_loss"):
        assert isinstance(first[name], float)


def test_utilisation_is_the_share_of_the_peak(tmp_path: Path, clock: Clock) -> None:
    steps = [(3.0, result(2.0, 100)), (3.0, result(1.0, 300))]
    (unknown,) = run(tmp_path / "unknown", clock, steps)
    assert unknown["utilisation"] is None
    (known,) = run(tmp_path / "known", clock, steps, peak=1000.0)
    assert known["utilisation"] == pytest.approx(4000.0 / 6.0 / 1000.0)


def test_rejected_batches_do_not_count_towards_the_loss(tmp_path: Path, clock: Clock) -> None:
    bad = result(math.nan, 50, "loss is not finite")
    mixed, only_bad = run(tmp_path, clock, [(3.0, bad), (3.0, result(2.0, 50)), (6.0, bad)])
    assert mixed["loss"] == pytest.approx(2.0)
    assert only_bad["loss"] is None


def test_one_slow_interval_moves_the_speed_by_less_than_itself(tmp_path: Path, clock: Clock) -> None:
    events = run(tmp_path, clock, [(1.0, result(1.0, 100))] * 60 + [(5.0, result(1.0, 100))])
    assert events[-2]["steps_per_second"] == pytest.approx(1.0)
    assert 0.8 < events[-1]["steps_per_second"] < 1.0
    assert events[-1]["eta_seconds"] == pytest.approx((1000 - 61) / events[-1]["steps_per_second"])
