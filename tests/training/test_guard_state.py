"""What the guard rests on survives a crash, and what a rollback changes is checked after the old state is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cvm_translator.checkpoints.store import CheckpointStore
from cvm_translator.errors import CheckpointError
from cvm_translator.training.state import LoopState

DEGRADED = {(1, 10): "degraded"}


def test_the_window_of_losses_is_in_the_checkpoint(bench: Any) -> None:
    """All accepted losses, bit for bit, and not the rejected one; a loop that resumes judges by the same window."""
    bench.run(num_iterations=8, faults=[{"kind": "nan_loss", "from_step": 4, "num_steps": 1}])
    accepted = [event["loss"] for event in bench.events("train") if not event["skipped"]]
    loaded = CheckpointStore(bench.folder / "run/checkpoints", report=print).load_newest_valid()
    assert loaded is not None
    assert loaded.plain["spikes"] == {"losses": accepted}
    assert len(accepted) == 8
    resumed = bench.build(num_iterations=8)
    resumed.run()
    assert resumed.spikes.state_dict() == {"losses": accepted}


def test_a_rollback_whose_other_data_are_lost_is_found_out(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Restoring the old state over the change of recipe must not go unnoticed, also where asserts are off."""
    loop = bench.build(DEGRADED)
    monkeypatch.setattr(loop.setup.batches, "change_stream", lambda stream: None)
    with pytest.raises(RuntimeError, match="data_stream is 0 after a rollback that changes it to 1"):
        loop.run()


class Stubborn(LoopState):
    """Keeps the learning rate that it began with."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name != "learning_rate_factor" or name not in self.__dict__:
            super().__setattr__(name, value)


def test_a_rollback_whose_learning_rate_is_lost_is_found_out(bench: Any) -> None:
    """The second rollback halves it."""
    loop = bench.build({(1, 10): "degraded", (2, 10): "degraded"}, guard={"max_step_budget_ratio": 3.0})
    original = loop._restore

    def restore(checkpoint: Any) -> Any:
        result = original(checkpoint)
        loop.state = Stubborn(**vars(loop.state))
        return result

    loop._restore = restore
    with pytest.raises(RuntimeError, match=r"learning_rate_factor is 1.0 after a rollback that changes it to 0.5"):
        loop.run()


def test_after_a_rollback_the_optimizer_moves_at_the_lower_rate(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rate within the optimizer itself, whose old state was loaded."""
    script = {(1, 10): "degraded", (2, 10): "degraded"}
    loop = bench.build(script, guard={"max_step_budget_ratio": 3.0})
    rates: dict[tuple[int, int], float] = {}
    original = loop.optimizer.step

    def step() -> None:
        rates[loop.state.attempt, loop.state.step + 1] = loop.optimizer.param_groups[0]["lr"]
        original()

    monkeypatch.setattr(loop.optimizer, "step", step)
    loop.run()
    assert rates[2, 6] == rates[1, 6]
    assert rates[3, 6] == pytest.approx(rates[1, 6] / 2)


# --------------------------------------------------------------------------------------------- the rollback on disk


def decide(bench: Any, monkeypatch: pytest.MonkeyPatch, script: dict[tuple[int, int], str] = DEGRADED) -> Path:
    """End a process right after its last rollback of a script was decided; where that is written."""
    loop = bench.build(script)
    original = loop._carry_out

    def carry_out(decision: dict[str, Any], target: Any) -> None:
        if decision["attempt"] == len(script) + 1:
            raise KeyboardInterrupt
        original(decision, target)

    monkeypatch.setattr(loop, "_carry_out", carry_out)
    with pytest.raises(KeyboardInterrupt):
        loop.run()
    loop.setup.events.flush()
    path: Path = loop.decision.path
    return path


def damage(path: Path, how: str) -> None:
    text = path.read_text()
    changed = {
        "a number": text.replace('"attempt": ', '"attempt": 1'),
        "the checksum's name": text.replace('"checksum"', '"chdcksum"'),
        "cut": text[: len(text) // 2],
        "empty": "",
        "no text": "\udcff{",
        "something else": "[1, 2]",
    }
    assert changed[how] != text
    path.write_text(changed[how], errors="surrogateescape")


DAMAGES = ["a number", "the checksum's name", "cut", "empty", "no text", "something else"]


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_decision_that_nothing_shows_is_an_error_with_the_remedy(
    how: str, bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = bench.run(DEGRADED, folder="whole")
    path = decide(bench, monkeypatch)
    damage(path, how)
    with pytest.raises(CheckpointError, match=r"rollback.json is damaged.*restore it from a backup, or delete it"):
        bench.run(DEGRADED)
    path.unlink()
    assert bench.run(DEGRADED).state == expected.state
    assert bench.losses() == bench.losses("whole")


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_decision_that_was_carried_out_is_passed_over(
    how: str, bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that was not is decided again by the steps that are repeated."""
    script = DEGRADED | {(2, 10): "degraded"}
    guard = {"max_step_budget_ratio": 3.0}
    expected = bench.run(script, guard=guard, folder="whole")
    damage(decide(bench, monkeypatch, script), how)
    assert bench.run(script, guard=guard).state == expected.state
    assert bench.losses() == bench.losses("whole")
    (warning,) = bench.events("warning")
    assert warning["code"] == "checkpoint"
    assert "rollback.json is damaged and passed over" in warning["message"]


def test_a_decision_of_a_version_without_checksums_is_carried_out(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = bench.run(DEGRADED, folder="whole")
    path = decide(bench, monkeypatch)
    data = json.loads(path.read_text())
    del data["checksum"]
    path.write_text(json.dumps(data))
    assert bench.run(DEGRADED).state == expected.state
    assert [e["attempt"] for e in bench.events("verdict") if e["step"] == 10] == [1, 2]


def test_a_gradient_that_is_not_finite_never_reaches_the_optimizer(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The optimizer moves exactly once for each step that was accepted."""
    loop = bench.build(num_iterations=8, faults=[{"kind": "nan_loss", "from_step": 3, "num_steps": 2}])
    moves = []
    original = loop.optimizer.step
    monkeypatch.setattr(loop.optimizer, "step", lambda: (moves.append(loop.state.executed_steps + 1), original()))
    loop.run()
    assert moves == [1, 2, 5, 6, 7, 8, 9, 10]
