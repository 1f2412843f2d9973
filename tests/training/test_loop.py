"""The loop on a tiny model under a judge with a script: keep, roll back, halt, and losses that are bad."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from cvm_translator.errors import Stopped
from cvm_translator.training.signals import StopRequest

DEGRADED = {(1, 10): "degraded"}
NAN = [{"kind": "nan_loss", "from_step": 7, "num_steps": 3}]


# ------------------------------------------------------------------------------------------------------- a healthy run


def test_a_healthy_run_is_exactly_as_long_as_asked(bench: Any) -> None:
    outcome = bench.run({(1, 15): "healthy", (1, 20): "warning"})
    assert (outcome.state.step, outcome.state.executed_steps, outcome.halted) == (20, 20, None)
    assert [event["step"] for event in bench.events("train")] == list(range(1, 21))
    assert [event["step"] for event in bench.events("verdict")] == [5, 10, 15, 20]
    assert [event["action"] for event in bench.events("verdict")] == ["keep"] * 4
    assert (outcome.final_checkpoint, outcome.state.best_step) == ("checkpoint_10", 10)
    assert bench.events("rollback") == []
    best = [event["path"] for event in bench.events("checkpoint") if event["is_best"]]
    assert best == ["checkpoint_5", "checkpoint_10"]
    assert (bench.folder / "run/checkpoints/best_model").readlink() == Path("checkpoint_10")
    assert (bench.folder / "run/checkpoints/latest").readlink() == Path("checkpoint_20")
    assert not (bench.folder / "run/checkpoints/checkpoint_0").exists()


def test_a_last_step_off_the_cadence_is_validated(bench: Any) -> None:
    outcome = bench.run(num_iterations=13)
    assert [event["step"] for event in bench.events("verdict")] == [5, 10, 13]
    assert outcome.final_checkpoint == "checkpoint_13"


def test_fake_quantisation_begins_on_its_step(bench: Any) -> None:
    loop = bench.build()
    seen = []
    original = loop.setup.prepare
    loop.setup.prepare = lambda model, bits: (seen.append((loop.state.step + 1, bits)), original(model, bits))
    loop.run()
    training = dict(seen)  # the last call for a step is the one before its forward pass
    assert [step for step, bits in training.items() if bits == 8] == list(range(11, 21))
    assert loop.setup.judge.widths == [8] * 4


def test_the_averaged_weights_are_validated_and_delivered(bench: Any) -> None:
    loop = bench.build(ema_decay=0.7)
    outcome = loop.run()
    expected, found = {**loop.setup.model.state_dict(), **loop.average.tensors}, bench.weights(outcome)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    name = next(name for name, _ in loop.setup.model.named_parameters())
    assert torch.equal(loop.setup.judge.seen_weights[-1], loop.average.tensors[name])
    assert not torch.equal(loop.average.tensors[name], loop.setup.model.state_dict()[name])


# ---------------------------------------------------------------------------------------------------------- rollback


def test_a_rollback_goes_to_the_best_and_changes_the_recipe(bench: Any) -> None:
    script = {(1, 10): "degraded", (2, 10): "emergency", (3, 10): "degraded"}
    outcome = bench.run(script, guard={"max_step_budget_ratio": 3.0})
    rollbacks = bench.events("rollback")
    assert [(e["from_step"], e["to_step"], e["rollback_number"]) for e in rollbacks] == [
        (10, 5, 1),
        (10, 5, 2),
        (10, 5, 3),
    ]
    assert [e["data_stream"] for e in rollbacks] == [1, 2, 3]
    assert [e["learning_rate_factor"] for e in rollbacks] == [1.0, 0.5, 0.25]
    assert rollbacks[0]["reason"] == "it is degraded"
    assert (outcome.state.step, outcome.state.executed_steps, outcome.state.attempt) == (20, 35, 4)
    assert outcome.final_checkpoint == "checkpoint_20.attempt_4"
    rates = {(e["attempt"], e["step"]): e["learning_rate"] for e in bench.events("train")}
    for attempt, factor in ((2, 1.0), (3, 0.5), (4, 0.25)):
        assert rates[attempt, 6] == pytest.approx(rates[1, 6] * factor)
    first_losses = {e["attempt"]: e["loss"] for e in bench.events("train") if e["step"] == 6}
    assert len(set(first_losses.values())) == 4  # other data, or the same data at another rate
    assert [record["reason"] for record in outcome.state.rollbacks] == [
        "it is degraded",
        "it is emergency",
        "it is degraded",
    ]


def test_the_state_is_the_bests_before_the_recipe_changes(bench: Any) -> None:
    """A rollback loads weights and moments of the best; the overrides come after, and hold."""
    loop = bench.build(DEGRADED)
    seen = []
    original = loop._restore

    def restore(checkpoint: Any) -> Any:
        result = original(checkpoint)
        seen.append((checkpoint.path.name, loop.state.attempt, loop.state.data_stream))
        return result

    loop._restore = restore
    loop.run()
    assert seen == [("checkpoint_5", 1, 0)]
    assert (loop.state.attempt, loop.state.data_stream, loop.setup.batches.stream) == (2, 1, 1)


def test_without_a_best_the_start_is_the_target(bench: Any) -> None:
    outcome = bench.run({(1, 5): "degraded"}, num_iterations=10, guard={"max_step_budget_ratio": 2.0})
    assert [e["to_step"] for e in bench.events("rollback")] == [0]
    assert outcome.state.step == 10


def test_after_the_last_rollback_the_loop_halts_with_the_best(bench: Any) -> None:
    script = {(attempt, 10): "degraded" for attempt in range(1, 5)}
    outcome = bench.run(script, guard={"max_step_budget_ratio": 3.0})
    assert len(outcome.state.rollbacks) == 3
    assert outcome.halted == "it is degraded; 3 rollbacks did not help"
    assert outcome.final_checkpoint == "checkpoint_5"
    assert [e["action"] for e in bench.events("verdict") if e["step"] == 10] == ["roll_back"] * 3 + ["halt"]
    again = bench.run(script, guard={"max_step_budget_ratio": 3.0})
    assert again == outcome
    assert len(bench.events("train")) == outcome.state.executed_steps == 5 + 4 * 5


def test_the_step_budget_is_never_exceeded(bench: Any) -> None:
    script = {(attempt, 10): "degraded" for attempt in range(1, 5)}
    outcome = bench.run(script, guard={"max_step_budget_ratio": 1.1})
    assert outcome.state.executed_steps == 22
    assert outcome.halted == "the step budget is used up (22 steps executed)"
    assert outcome.final_checkpoint == "checkpoint_5"


def test_patience_runs_out(bench: Any) -> None:
    script = {(1, step): "healthy" for step in (10, 15, 20)}
    outcome = bench.run(script, guard={"early_stopping_validations": 2})
    assert outcome.halted == "no new best in 2 validations"
    assert (outcome.state.step, outcome.final_checkpoint) == (15, "checkpoint_5")


def test_a_validation_without_a_decision_costs_no_patience(bench: Any) -> None:
    script = {(1, 10): "healthy", (1, 15): "no_decision", (1, 20): "healthy"}
    outcome = bench.run(script, num_iterations=30, guard={"early_stopping_validations": 2})
    assert outcome.halted == "no new best in 2 validations"
    assert outcome.state.step == 20
    assert [e["action"] for e in bench.events("verdict")] == ["keep", "keep", "keep", "halt"]


def test_no_decision_keeps_the_best_and_does_not_roll_back(bench: Any) -> None:
    outcome = bench.run({(1, 10): "no_decision", (1, 15): "healthy", (1, 20): "healthy"})
    assert (outcome.final_checkpoint, outcome.state.rollbacks) == ("checkpoint_5", [])


# ------------------------------------------------------------------------------------------------ losses that are bad


def test_single_bad_batches_are_skipped_and_made_up_for(bench: Any) -> None:
    outcome = bench.run(faults=[{"kind": "nan_loss", "from_step": 7, "num_steps": 2}])
    assert (outcome.state.step, outcome.state.executed_steps, outcome.state.num_skipped) == (20, 22, 2)
    assert outcome.state.rollbacks == []
    skipped = [event for event in bench.events("train") if event["skipped"]]
    assert [(event["step"], event["executed_step"], event["loss"]) for event in skipped] == [
        (7, 7, "nan"),
        (7, 8, "nan"),
    ]
    assert [event["code"] for event in bench.events("warning")] == ["batch_skipped"] * 2


def test_three_in_a_row_roll_back(bench: Any) -> None:
    outcome = bench.run(faults=NAN)
    (rollback,) = bench.events("rollback")
    assert (rollback["from_step"], rollback["to_step"]) == (6, 5)
    assert rollback["reason"] == "emergency: loss is not finite in 3 batches in a row"
    assert (outcome.state.step, outcome.state.executed_steps) == (20, 24)


@pytest.mark.parametrize("from_step", [2, 7])
def test_a_run_that_stays_bad_halts_with_what_it_has(from_step: int, bench: Any) -> None:
    """Before the first validation and after it."""
    outcome = bench.run(faults=[{"kind": "nan_loss", "from_step": from_step}], guard={"max_step_budget_ratio": 9.0})
    assert outcome.halted == "emergency: loss is not finite in 3 batches in a row; 3 rollbacks did not help"
    assert outcome.final_checkpoint == ("checkpoint_0.attempt_4" if from_step == 2 else "checkpoint_5")
    assert all(torch.isfinite(tensor).all() for tensor in bench.weights(outcome).values())


def test_with_the_guard_off_nothing_rolls_back_and_the_last_weights_are_delivered(bench: Any) -> None:
    outcome = bench.run({(1, 10): "degraded", (1, 20): "emergency"}, faults=NAN, guard={"enabled": False})
    assert bench.events("rollback") == []
    assert (outcome.state.step, outcome.state.executed_steps, outcome.halted) == (20, 23, None)
    assert outcome.final_checkpoint == "checkpoint_20"
    hopeless = bench.run(faults=[{"kind": "nan_loss", "from_step": 7}], guard={"enabled": False}, folder="hopeless")
    assert (hopeless.state.step, hopeless.state.executed_steps) == (6, 26)
    assert hopeless.final_checkpoint == "checkpoint_6"
    bench.weights(hopeless, "hopeless")


def test_a_stop_after_a_skipped_batch_keeps_the_best_marked(bench: Any) -> None:
    """The best checkpoint's step is saved once more; it must stay the best for retention and repair."""
    stop = StopRequest()
    loop = bench.build(faults=[{"kind": "nan_loss", "from_step": 6, "num_steps": 1}], stop=stop)
    original = loop._after_rejection

    def after_rejection(result: Any) -> None:
        original(result)
        stop.request()

    loop._after_rejection = after_rejection
    with pytest.raises(Stopped):
        loop.run()
    saved = loop.setup.store.load("checkpoint_5")
    assert saved.is_best
    assert saved.plain["loop"]["executed_steps"] == 6
