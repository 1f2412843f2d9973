"""Quick instances of the benchmarks that need no run: their systems compute what they are said to."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import loss, training

PROBLEM = loss.Problem(tokens=40, vocabulary=60, student_dim=16, teacher_dim=24)


def test_the_naive_loss_is_ours_in_float64() -> None:
    inputs = loss.Inputs.draw(PROBLEM).head(PROBLEM.tokens, torch.float64)
    twin = inputs.head(PROBLEM.tokens, torch.float64)
    ours, naive = loss.compute_ours(inputs), loss.compute_naive(twin)
    torch.testing.assert_close(ours, naive)
    torch.autograd.backward([ours, naive])
    torch.testing.assert_close(inputs.hidden.grad, twin.hidden.grad)
    torch.testing.assert_close(inputs.matrix.grad, twin.matrix.grad)


def test_the_claims_about_the_loss_can_fail() -> None:
    good = {"peak_mib": 1.0, "seconds": 1.0, "error": 0.001}
    bad = {"peak_mib": 1.5, "seconds": 0.5, "error": 0.5}
    systems = {loss.OURS: good, loss.NAIVE: bad, "liger 64": bad}
    found = loss.check(systems)
    assert all(found.values()) and len(found) == 5
    far = {"peak_mib": 20.0, "seconds": 2.0, "error": 0.001}
    assert not any(loss.check({loss.OURS: good, loss.NAIVE: far, "liger 64": far}).values())
    assert len(loss.check({loss.OURS: good})) == 1  # what was not run is not claimed


@pytest.mark.parametrize("teacher", [None, "tiny"])
def test_our_side_of_the_training_benchmark(teacher: str | None, tmp_path: Path) -> None:
    parts = training.Parts.build(training.Problem("tiny", teacher, 100, 8, num_steps=3, num_warm_up=2))
    figures = training.run_ours(parts, tmp_path, has_stored_states=teacher is not None)
    assert figures["tokens_per_second"] > 0 and 0 < figures["utilisation"] < 2
    assert ("states_seconds" in figures) == (teacher is not None)


def test_the_stopwatch_leaves_the_warm_up_out(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([100.0, 101.0, 103.0, 105.0])
    monkeypatch.setattr(training.time, "perf_counter", lambda: next(times))
    watch = training.Stopwatch(num_warm_up=2)
    for num_tokens in (50, 60, 100, 180):
        watch.mark(num_tokens)
    assert watch.rate() == pytest.approx((180 - 60) / (105.0 - 101.0))
