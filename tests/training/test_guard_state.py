"""What the guard rests on survives a crash, and what a rollback changes is checked after the old state is loaded."""

from __future__ import annotations

from typing import Any

import pytest

from cvm_translator.checkpoints.store import CheckpointStore

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
    """The change of recipe is asserted: restoring the old state over it must not go unnoticed."""
    loop = bench.build(DEGRADED)
    monkeypatch.setattr(loop.setup.batches, "change_stream", lambda stream: None)
    with pytest.raises(AssertionError):
        loop.run()


def test_a_gradient_that_is_not_finite_never_reaches_the_optimizer(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The optimizer moves exactly once for each step that was accepted."""
    loop = bench.build(num_iterations=8, faults=[{"kind": "nan_loss", "from_step": 3, "num_steps": 2}])
    moves = []
    original = loop.optimizer.step
    monkeypatch.setattr(loop.optimizer, "step", lambda: (moves.append(loop.state.executed_steps + 1), original()))
    loop.run()
    assert moves == [1, 2, 5, 6, 7, 8, 9, 10]
