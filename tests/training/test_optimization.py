"""Learning-rate schedules, weight decay, the moving average and the window that tells spikes."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cvm_translator.config.schema import TrainingConfig
from cvm_translator.models.transformer import CvmTransformer
from cvm_translator.training.optimizer import MovingAverage, build_optimizer
from cvm_translator.training.schedules import DECAYS, compute_learning_rate
from cvm_translator.training.spikes import MIN_HISTORY, SpikeWindow

# ---------------------------------------------------------------------------------------------------------- schedules


def rates(schedule: str, steps: list[int], **changes: float) -> list[float]:
    plain = {"num_iterations": 100, "warmup_steps": 20, "learning_rate": 1e-3, "schedule": schedule}
    training = TrainingConfig(**(plain | changes))  # type: ignore[arg-type]
    return [compute_learning_rate(training, step) for step in steps]


@pytest.mark.parametrize("schedule", sorted(DECAYS))
def test_warm_up_is_linear_to_the_peak(schedule: str) -> None:
    assert rates(schedule, [1, 5, 10, 20]) == pytest.approx([5e-5, 2.5e-4, 5e-4, 1e-3])


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [1e-3, 1e-3, 1e-3]),
        ("linear", [0.75e-3, 0.5e-3, 0.0]),
        ("cosine", [0.5e-3 * (1 + math.cos(math.pi / 4)), 0.5e-3, 0.0]),
        ("inverse_sqrt", [1e-3 / math.sqrt(2), 1e-3 / math.sqrt(3), 1e-3 / math.sqrt(5)]),
    ],
)
def test_decay(schedule: str, expected: list[float]) -> None:
    assert rates(schedule, [40, 60, 100]) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("schedule", sorted(DECAYS))
def test_the_floor_holds_and_no_warm_up_starts_at_the_peak(schedule: str) -> None:
    assert min(rates(schedule, list(range(20, 101)), min_learning_rate_ratio=0.3)) >= 0.3e-3
    assert rates(schedule, [1], warmup_steps=0)[0] <= 1e-3
    assert rates(schedule, [1], warmup_steps=0)[0] >= 0.98e-3


# ---------------------------------------------------------------------------------------------------------- optimizer


def test_only_matrices_decay(make_model: Callable[..., CvmTransformer]) -> None:
    model = make_model()
    optimizer = build_optimizer(model, TrainingConfig(weight_decay=0.1))
    decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    undecayed = {id(p) for group in optimizer.param_groups if not group["weight_decay"] for p in group["params"]}
    assert decayed == {id(p) for p in model.parameters() if p.dim() == 2}
    assert decayed | undecayed == {id(p) for p in model.parameters()}


def test_the_average_is_the_recursion_with_a_decay_that_warms_up(make_model: Callable[..., CvmTransformer]) -> None:
    model = make_model()
    average = MovingAverage(model, 0.6)
    expected = {name: parameter.detach().double().clone() for name, parameter in model.named_parameters()}
    for update in range(1, 15):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        average.update()
        decay = min(0.6, (1 + update) / (10 + update))
        for name, parameter in model.named_parameters():
            expected[name] = decay * expected[name] + (1 - decay) * parameter.detach().double()
    assert decay == 0.6
    for name, tensor in average.tensors.items():
        torch.testing.assert_close(tensor.double(), expected[name], rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------------------------------- spikes

quick = settings(deadline=None, max_examples=60)
finite = st.floats(min_value=0.01, max_value=50.0)
anything = st.floats(allow_nan=True, allow_infinity=True)


@quick
@given(st.lists(anything, max_size=60))
def test_what_is_not_finite_is_never_admitted_and_rejection_changes_nothing(losses: list[float]) -> None:
    window = SpikeWindow(30, 20.0)
    for loss in losses:
        before = window.state_dict()
        if window.admits(loss):
            assert math.isfinite(loss)
            window.add(loss)
        else:
            assert window.state_dict() == before
    assert all(math.isfinite(loss) for loss in window.state_dict()["losses"])
    assert not any(window.admits(bad) for bad in (math.nan, math.inf, -math.inf))


@quick
@given(st.lists(finite, min_size=MIN_HISTORY, max_size=60), finite)
def test_a_fall_is_never_a_spike_and_a_great_rise_is_one(losses: list[float], rise: float) -> None:
    window = SpikeWindow(100, 20.0)
    for loss in losses:
        window.add(loss)
    ordered = sorted(losses)
    assert window.admits(ordered[0] * 0.5)
    assert window.admits(ordered[len(ordered) // 2])
    deviation = max(ordered) - min(ordered)  # the median absolute deviation is smaller
    assert not window.admits(max(ordered) + 20.0 * 1.4826 * deviation + 1.01 * max(ordered) + rise)


@quick
@given(st.lists(finite, max_size=MIN_HISTORY - 1), finite)
def test_nothing_finite_is_judged_before_there_is_history(losses: list[float], loss: float) -> None:
    window = SpikeWindow(30, 20.0)
    for value in losses:
        window.add(value)
    assert window.admits(loss)


@quick
@given(st.lists(finite, max_size=80))
def test_a_restored_window_judges_alike(losses: list[float]) -> None:
    window, other = SpikeWindow(25, 20.0), SpikeWindow(25, 20.0)
    for loss in losses:
        window.add(loss)
    other.add(99.0)
    other.load_state_dict(window.state_dict())
    assert other.state_dict() == window.state_dict()
    assert len(other.state_dict()["losses"]) <= 25
    for loss in (0.1, 1.0, 30.0, 300.0):
        assert other.admits(loss) == window.admits(loss)


def test_one_spike_does_not_hide_the_next() -> None:
    window = SpikeWindow(30, 20.0)
    for step in range(30):
        window.add(2.0 + 0.1 * (step % 5))
    assert [window.admits(loss) for loss in (9.0, 9.0, 9.0, 2.3)] == [False, False, False, True]
