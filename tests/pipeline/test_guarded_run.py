"""Real students under the guard with planted faults that it is told nothing about: what it does, and what it saves.

The loop's rules are tested in tests/training; here the verdicts are real, on the output of real models.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from cvm_translator.config import load_config
from cvm_translator.pipeline.context import RunContext
from cvm_translator.pipeline.student import StudentOutcome, distil
from cvm_translator.pipeline.teacher import obtain_teacher
from cvm_translator.pipeline.text import build_corpus, build_tokenizer
from cvm_translator.runs.events import EventWriter, read_events
from cvm_translator.runs.layout import RunLayout
from cvm_translator.training.device import configure_threads
from cvm_translator.training.signals import StopRequest

pytestmark = pytest.mark.timeout(600)  # the reference run may still have to be made

# A student that begins as good as its teacher, so that a few steps suffice to show what harms it.
STUDENT = {
    "student": {"init": "teacher_layers"},
    "distillation": {"num_iterations": 40, "warmup_steps": 4, "ema_decay": 0.0, "grad_accum_steps": 1},
    "validation": {"every_steps": 10},
    "guard": {"max_step_budget_ratio": 3.0},
    "quantization": {"start_fraction": 0.0},
}


@dataclasses.dataclass(frozen=True)
class Trained:
    outcome: StudentOutcome
    events: list[dict[str, Any]]

    def kind(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in self.events if event["kind"] == kind and event.get("stage") == "distil"]

    @property
    def qualities(self) -> dict[tuple[int, int], float]:
        return {(e["attempt"], e["step"]): e["quality_score"] for e in self.kind("validation")}

    @property
    def best_before_the_fault(self) -> int:
        """Which of the first two validations was the better one: both are about as good as the teacher."""
        return max((10, 20), key=lambda step: self.qualities[1, step])

    @property
    def delivered_quality(self) -> float:
        name = self.outcome.loop.final_checkpoint.removeprefix("checkpoint_")
        step, _, attempt = name.partition(".attempt_")
        return self.qualities[int(attempt or 1), int(step)]


@pytest.fixture(scope="module")
def train(numbers: Any, whole_run: Any) -> Any:
    """Everything up to the trained student, in this process, with the reference run's teacher."""

    def run(name: str, **changes: Any) -> Trained:
        teacher = {"kind": "checkpoint", "path": str(whole_run.folder / "teacher/model")}
        path = numbers.write_config(name, **STUDENT, teacher=teacher)
        overrides = [f"{key.replace('__', '.')}={value}" for key, value in changes.items()]
        config = load_config(path, overrides, numbers.folder / name)
        layout = RunLayout(Path(config.output_dir))
        device = torch.device("cpu")
        configure_threads(1, device, deterministic=False)
        with EventWriter(layout.events) as events:
            context = RunContext(config, layout, events, StopRequest(), device, lambda message: None)
            corpus = build_corpus(context)
            tokenizer = build_tokenizer(context, corpus)
            outcome = distil(context, corpus, tokenizer, obtain_teacher(context, corpus, tokenizer))
        return Trained(outcome, list(read_events(layout.events)))

    return run


RATE_FAULT = "[{kind: learning_rate, factor: 50, from_step: 21, num_steps: 10}]"
SHUFFLED = "[{kind: shuffled_targets, from_step: 21}]"
BLIND = "1.0e+9"
"""Spike threshold at which no loss counts as a spike, so that only validations can find the fault."""


@pytest.fixture(scope="module")
def rescued(train: Any) -> Trained:
    return train("rescued", fault_injection=RATE_FAULT, guard__spike_threshold=BLIND)


def test_a_healthy_run_never_rolls_back(train: Any) -> None:
    healthy = train("healthy")
    assert healthy.kind("rollback") == []
    assert {event["action"] for event in healthy.kind("verdict")} == {"keep"}
    assert healthy.outcome.loop.state.executed_steps == 40
    assert healthy.delivered_quality > 0.95


def test_a_learning_rate_of_fifty_times_is_rolled_back_to_the_best(rescued: Trained, find_event_problems: Any) -> None:
    """The output of step 30 is bad; the same steps on other data then do no harm."""
    assert find_event_problems(rescued.events) == []
    (rollback,) = rescued.kind("rollback")
    best = rescued.best_before_the_fault
    assert (rollback["from_step"], rollback["to_step"]) == (30, best)
    assert (rollback["data_stream"], rollback["learning_rate_factor"]) == (1, 1.0)
    verdict = next(event for event in rescued.kind("verdict") if event["action"] == "roll_back")
    assert verdict["verdict"] in ("degraded", "emergency")
    assert verdict["reason"] == rollback["reason"]
    state = rescued.outcome.loop.state
    assert (state.step, state.executed_steps, state.attempt) == (40, 30 + 40 - best, 2)
    assert rescued.outcome.loop.halted is None


def test_it_ends_no_worse_than_its_best(rescued: Trained) -> None:
    assert rescued.delivered_quality == max(rescued.qualities.values())
    assert rescued.delivered_quality > 0.95
    assert rescued.qualities[1, 30] < 0.5


def test_without_the_guard_the_last_weights_are_delivered_and_are_worse(train: Any, rescued: Trained) -> None:
    unguarded = train("unguarded", guard__enabled="false", fault_injection=RATE_FAULT.replace("21", "31"))
    assert unguarded.kind("rollback") == []
    assert unguarded.outcome.loop.final_checkpoint == "checkpoint_40"
    assert unguarded.outcome.loop.state.executed_steps == 40
    assert unguarded.delivered_quality < rescued.delivered_quality - 0.1


def test_spikes_of_the_loss_are_found_before_any_validation(train: Any) -> None:
    """The step after a ruinous update has a loss far above the window; three such in a row are an emergency."""
    spiked = train("spiked", fault_injection=RATE_FAULT.replace("num_steps: 10", "num_steps: 2"))
    rollbacks = spiked.kind("rollback")
    assert [(e["to_step"], e["reason"]) for e in rollbacks] == [
        (spiked.best_before_the_fault, "emergency: loss spike in 3 batches in a row")
    ]
    assert rollbacks[0]["from_step"] < 30
    assert spiked.outcome.loop.state.step == 40
    assert spiked.delivered_quality > 0.95


def test_targets_shuffled_for_good_halt_it_with_the_best(train: Any) -> None:
    changes = {"fault_injection": SHUFFLED, "guard__spike_threshold": BLIND, "distillation__schedule": "constant"}
    changes |= {"distillation__alpha": "0.0", "distillation__beta": "1.0"}
    halted = train("halted", **changes)
    assert len(halted.kind("rollback")) == 3
    assert [e["learning_rate_factor"] for e in halted.kind("rollback")] == [1.0, 0.5, 0.25]
    assert halted.outcome.loop.halted is not None
    assert "3 rollbacks did not help" in halted.outcome.loop.halted
    assert halted.outcome.loop.state.step < 40
    assert halted.delivered_quality == max(halted.qualities.values())
    assert halted.delivered_quality > 0.95
    again = train("halted", **changes)
    assert again.outcome.loop == halted.outcome.loop
    assert len(again.kind("train")) == len(halted.kind("train"))


def test_losses_that_are_not_numbers_are_survived(train: Any, find_event_problems: Any) -> None:
    nan = train("nan", fault_injection="[{kind: nan_loss, from_step: 15, num_steps: 3}]")
    (rollback,) = nan.kind("rollback")
    assert rollback["reason"] == "emergency: loss is not finite in 3 batches in a row"
    assert (rollback["from_step"], rollback["to_step"]) == (14, 10)
    assert nan.outcome.loop.state.num_skipped == 3
    assert find_event_problems(nan.events) == []
    assert nan.delivered_quality > 0.95
