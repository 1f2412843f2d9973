"""The loop on a tiny model under a judge with a script: keep, roll back, halt, and exactness through every crash."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cvm_translator.checkpoints.folder import DiskFullError
from cvm_translator.checkpoints.store import CheckpointStore
from cvm_translator.errors import CheckpointError, Stopped
from cvm_translator.training.resume import delivered_weights
from cvm_translator.training.setup import LoopOutcome
from cvm_translator.training.signals import StopRequest
from cvm_translator.training.state import LoopState

DEGRADED = {(1, 10): "degraded"}
NAN = [{"kind": "nan_loss", "from_step": 7, "num_steps": 3}]


class Crash(BaseException):
    """Ends a loop at a chosen place, as a kill would: nothing in the program catches it."""


def crash_after(owner: Any, method: str, count: int, monkeypatch: pytest.MonkeyPatch, *, before: bool = False) -> None:
    """Let the `count`-th call of a method of the real object be the last thing that happens."""
    original, calls = getattr(owner, method), [0]

    def wrapper(*arguments: Any, **options: Any) -> Any:
        calls[0] += 1
        if before and calls[0] == count:
            raise Crash
        result = original(*arguments, **options)
        if calls[0] == count:
            raise Crash
        return result

    monkeypatch.setattr(owner, method, wrapper)


def weights(loop_folder: Path, outcome: LoopOutcome) -> dict[str, torch.Tensor]:
    return delivered_weights(CheckpointStore(loop_folder / "checkpoints", report=print), outcome)


def assert_equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


def newest(folder: Path) -> dict[str, Any]:
    """The whole state at the end: weights, moments, random generators, window, judge, place in the data."""
    loaded = CheckpointStore(folder / "checkpoints", report=print).load_newest_valid()
    assert loaded is not None
    return {"tensors": loaded.tensors, "torch_states": loaded.torch_states, "plain": loaded.plain}


def assert_same_state(left: Any, right: Any, place: str = "state") -> None:
    if isinstance(left, dict):
        assert left.keys() == right.keys(), place
        for key in left:
            assert_same_state(left[key], right[key], f"{place}.{key}")
    elif isinstance(left, torch.Tensor):
        assert torch.equal(left, right), place
    elif isinstance(left, list | tuple):
        assert len(left) == len(right), place
        for index, (ours, theirs) in enumerate(zip(left, right, strict=True)):
            assert_same_state(ours, theirs, f"{place}[{index}]")
    else:
        assert left == right, place


def flip_a_bit(folder: Path) -> None:
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


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
    original = loop.setup.model.set_fake_quantization
    loop.setup.model.set_fake_quantization = lambda on: (seen.append((loop.state.step + 1, on)), original(on))
    loop.run()
    training = dict(seen)  # the last call for a step is the one before its forward pass
    assert [step for step, on in training.items() if on] == list(range(11, 21))


def test_the_averaged_weights_are_validated_and_delivered(bench: Any) -> None:
    loop = bench.build(ema_decay=0.7)
    outcome = loop.run()
    assert_equal(weights(bench.folder / "run", outcome), {**loop.setup.model.state_dict(), **loop.average.tensors})
    name = next(name for name, _ in loop.setup.model.named_parameters())
    assert torch.equal(loop.setup.judge.seen_weights[-1], loop.average.tensors[name])
    assert not torch.equal(loop.average.tensors[name], loop.setup.model.state_dict()[name])


# ------------------------------------------------------------------------------------------------------ exact resume

OPTIONS: list[dict[str, Any]] = [
    {},
    {"grad_accum_steps": 2, "ema_decay": 0.8, "schedule": "cosine"},
    {"script": DEGRADED},
    {"faults": NAN},
]


@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "accumulated", "rolled_back", "nan"])
def test_crashes_everywhere_change_no_bit(options: dict[str, Any], bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Crash in a step, before and after a save, in a judgement, between decision and rollback: one loss per step."""
    expected = bench.run(folder="whole", **options)
    outcome, starts = None, 0
    places: list[tuple[Callable[[Any], Any], str, int, bool]] = [
        (lambda loop: loop, "_step", 4, False),
        (lambda loop: loop.setup.store, "save", 2, True),
        (lambda loop: loop.setup.store, "save", 2, False),
        (lambda loop: loop.setup.judge, "judge", 1, False),
        (lambda loop: loop.decision, "write", 1, False),
        (lambda loop: loop, "_restore", 2, False),
        (lambda loop: loop, "_step", 6, False),
        (lambda loop: loop.setup.store, "save", 3, False),
    ]
    while outcome is None:
        loop = bench.build(**options)
        with monkeypatch.context() as patch:
            if starts < len(places):
                find, method, count, before = places[starts]
                crash_after(find(loop), method, count, patch, before=before)
            starts += 1
            try:
                outcome = loop.run()
            except Crash:
                loop.setup.events._buffer.clear()  # a killed process takes them with it
            finally:
                loop.setup.events.flush()
    assert starts > 4
    losses = bench.losses()
    assert all(len(values) == 1 for values in losses.values())
    assert losses == bench.losses("whole")
    assert outcome.state == expected.state
    assert outcome.final_checkpoint == expected.final_checkpoint
    assert_equal(weights(bench.folder / "run", outcome), weights(bench.folder / "whole", expected))
    assert_same_state(newest(bench.folder / "run"), newest(bench.folder / "whole"))
    assert all(event["exact"] for event in bench.events("resumed"))
    rollbacks = {event["rollback_number"]: event["from_step"] for event in bench.events("rollback")}
    assert rollbacks == {
        event["rollback_number"]: event["from_step"] for event in bench.events("rollback", folder="whole")
    }


def test_a_finished_loop_runs_no_step_again(bench: Any) -> None:
    first = bench.run()
    again = bench.run()
    assert again == first
    assert len(bench.events("train")) == 20


def test_an_incomplete_state_is_an_error() -> None:
    plain = LoopState().to_plain()
    del plain["executed_steps"]
    with pytest.raises(KeyError, match="executed_steps"):
        LoopState.from_plain(plain)


def test_another_thread_count_is_announced(bench: Any) -> None:
    bench.run(num_iterations=8)
    loop = bench.build(num_iterations=8)
    torch.set_num_threads(2)
    try:
        loop.run()
    finally:
        torch.set_num_threads(1)
        loop.setup.events.flush()
    (event,) = bench.events("resumed")
    assert (event["exact"], event["differences"]) == (False, ["num_threads: was 1, is 2"])


@pytest.mark.parametrize("at_step", [2, 3, 5])
def test_a_stop_request_saves_at_the_steps_end(at_step: int, bench: Any) -> None:
    """On a step without a save, with one, and with a validation."""
    expected = bench.run(folder="whole")
    stop = StopRequest()
    loop = bench.build(stop=stop)
    original = loop._step

    def step() -> Any:
        if loop.state.step + 1 == at_step:
            stop.request(signal.SIGTERM)
        return original()

    loop._step = step
    with pytest.raises(Stopped) as stopped:
        loop.run()
    loop.setup.events.flush()
    assert stopped.value.exit_code == 143
    saved = [event["step"] for event in bench.events("checkpoint")]
    assert saved[-1] == at_step
    assert len(saved) == len(set(saved))
    outcome = bench.run()
    assert outcome.state == expected.state
    assert bench.losses() == bench.losses("whole")


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
    assert all(torch.isfinite(tensor).all() for tensor in weights(bench.folder / "run", outcome).values())


def test_with_the_guard_off_nothing_rolls_back_and_the_last_weights_are_delivered(bench: Any) -> None:
    outcome = bench.run({(1, 10): "degraded", (1, 20): "emergency"}, faults=NAN, guard={"enabled": False})
    assert bench.events("rollback") == []
    assert (outcome.state.step, outcome.state.executed_steps, outcome.halted) == (20, 23, None)
    assert outcome.final_checkpoint == "checkpoint_20"
    hopeless = bench.run(faults=[{"kind": "nan_loss", "from_step": 7}], guard={"enabled": False}, folder="hopeless")
    assert (hopeless.state.step, hopeless.state.executed_steps) == (6, 26)
    assert hopeless.final_checkpoint == "checkpoint_6"
    weights(bench.folder / "hopeless", hopeless)


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


# -------------------------------------------------------------------------------------------- damage and full disks


def test_a_damaged_best_gives_way_to_the_best_before_it(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    script = {(1, 15): "degraded"}
    loop = bench.build(script, num_iterations=15, guard={"max_step_budget_ratio": 2.0})
    original = loop.setup.judge.judge

    def judge(state: LoopState, model: Any) -> Any:
        if (state.attempt, state.step) == (1, 15):
            flip_a_bit(bench.folder / "run/checkpoints/checkpoint_10")
        return original(state, model)

    monkeypatch.setattr(loop.setup.judge, "judge", judge)
    loop.setup.store.protect("checkpoint_5")
    outcome = loop.run()
    loop.setup.events.flush()
    (rollback,) = bench.events("rollback")
    assert rollback["to_step"] == 5
    assert outcome.state.rollbacks[0]["to_step"] == 5
    assert (outcome.state.step, outcome.final_checkpoint) == (15, "checkpoint_15.attempt_2")
    (warning,) = bench.events("warning")
    assert "checkpoint_10 is damaged" in warning["message"]
    assert "checkpoint_5 is used in its place" in warning["message"]


def test_a_damaged_only_best_is_an_error_that_says_what_to_do(bench: Any) -> None:
    script = {(1, step): "healthy" for step in (10, 15, 20)}
    bench.run(script)
    flip_a_bit(bench.folder / "run/checkpoints/checkpoint_5")
    with pytest.raises(CheckpointError, match=r"checkpoint_5 is damaged.* no older best .*restore it .*train again"):
        bench.run(script)


def test_a_damaged_newest_checkpoint_costs_only_its_steps(bench: Any) -> None:
    expected = bench.run(folder="whole")
    with pytest.raises(Crash):
        loop = bench.build()
        loop._validate = lambda: (_ for _ in ()).throw(Crash)
        loop.run()
    loop.setup.events.flush()
    flip_a_bit(bench.folder / "run/checkpoints/checkpoint_3")
    outcome = bench.run()
    assert [event["step"] for event in bench.events("resumed")] == [0]
    assert "checkpoint_3 is damaged" in bench.reports[0]
    assert_equal(weights(bench.folder / "run", outcome), weights(bench.folder / "whole", expected))
    assert bench.losses() == bench.losses("whole")


def test_a_full_disk_during_a_save_leaves_the_older_checkpoints(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = bench.run(folder="whole")
    loop = bench.build()
    original, calls = loop.setup.store.save, [0]

    def save(*arguments: Any, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] == 3:
            raise DiskFullError("no room for the checkpoint of step 5")
        return original(*arguments, **options)

    monkeypatch.setattr(loop.setup.store, "save", save)
    with pytest.raises(DiskFullError):
        loop.run()
    loop.setup.events.flush()
    outcome = bench.run()
    assert [event["step"] for event in bench.events("resumed")] == [3]
    assert bench.losses() == bench.losses("whole")
    assert_equal(weights(bench.folder / "run", outcome), weights(bench.folder / "whole", expected))


def test_a_decision_is_carried_out_by_the_next_start(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process ends after the decision is on disk and before anything was done about it."""
    expected = bench.run(DEGRADED, folder="whole")
    loop = bench.build(DEGRADED)
    crash_after(loop.decision, "write", 1, monkeypatch)
    with pytest.raises(Crash):
        loop.run()
    loop.setup.events._buffer.clear()
    assert bench.events("rollback") == []
    outcome = bench.run(DEGRADED)
    assert outcome.state == expected.state
    assert [e["attempt"] for e in bench.events("verdict") if e["step"] == 10] == [1, 2]  # judged once, not again
    same = ("from_step", "to_step", "rollback_number", "reason", "attempt", "data_stream", "learning_rate_factor")
    (ours,), (theirs,) = bench.events("rollback"), bench.events("rollback", folder="whole")
    assert [ours[name] for name in same] == [theirs[name] for name in same]
    assert bench.losses() == bench.losses("whole")
    assert_equal(weights(bench.folder / "run", outcome), weights(bench.folder / "whole", expected))


def test_a_decision_outlives_the_loss_of_what_followed_it(bench: Any) -> None:
    """The rollback was carried out, then its checkpoints were lost: it is carried out again, not forgotten."""
    expected = bench.run(DEGRADED)
    for path in (bench.folder / "run/checkpoints").glob("checkpoint_*.attempt_2"):
        shutil.rmtree(path)
    outcome = bench.run(DEGRADED)
    assert outcome.state == expected.state
    assert json.loads((bench.folder / "run/checkpoints/rollback.json").read_text())["attempt"] == 2
    assert_equal(weights(bench.folder / "run", outcome), weights(bench.folder / "run", expected))
