"""The verdict of benchmarks/reliability/detection.py on made-up rollbacks."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.reliability import detection

HEALTHY, FOUND = "a healthy run never rolls back or halts", "a fault is found by the validation that follows it"
DROP = "dropped by +20.0% against the best (step 300), lower bound +15.0%, margin 5.0%"
SPIKES = "emergency: loss spike in 3 batches in a row"


def describe_run(*rollbacks: tuple[int, str], halted: bool = False) -> dict[str, Any]:
    return {
        "rollbacks": [{"from_step": step, "to_step": 300, "reason": reason} for step, reason in rollbacks],
        "halted": halted,
    }


@pytest.mark.parametrize(
    ("rollback", "is_found"),
    [
        ((400, DROP), True),
        ((301, SPIKES), True),
        ((300, SPIKES), True),  # the fault's first batches were rejected
        ((300, DROP), False),  # that validation came before the fault
        ((200, SPIKES), False),
        ((500, DROP), False),
    ],
)
def test_a_fault_counts_as_found_from_its_first_batch_to_the_next_validation(
    rollback: tuple[int, str], is_found: bool
) -> None:
    runs = {"healthy_1": describe_run(), **{name: describe_run((400, DROP)) for name in detection.FAULTS}}
    runs["learning_rate"] = describe_run(rollback)
    failures = detection.find_failures(runs, from_validation=300, every=100)
    assert failures == {HEALTHY: [], FOUND: [] if is_found else ["learning_rate"]}


def test_a_healthy_run_that_rolls_back_or_halts_is_a_failure() -> None:
    runs = {name: describe_run((400, DROP)) for name in detection.FAULTS}
    runs |= {"a": describe_run(), "b": describe_run((200, DROP)), "c": describe_run(halted=True)}
    failures = detection.find_failures(runs, from_validation=300, every=100)
    assert failures == {HEALTHY: ["b", "c"], FOUND: []}
