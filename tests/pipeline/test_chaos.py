"""The quick instance of benchmarks/reliability/chaos.py: a few kills of a tiny run, some of them inside a save."""

from __future__ import annotations

import json
import shutil
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.common import Arm
from benchmarks.reliability import chaos

NUM_KILLS = 4
NUM_KEPT = 2


@pytest.fixture
def options(numbers: Any, tmp_path: Path) -> Namespace:
    config = numbers.write_config("chaos", teacher={"training": {"num_iterations": 60, "validate_every_steps": 60}})
    return Namespace(config=config, work=tmp_path, set=[], steps=[], threads_per_arm=1, kills=NUM_KILLS, seed=13)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_few_kills_lose_nothing_and_change_no_bit(options: Namespace) -> None:
    data = chaos.run_benchmark(options)
    share = next(check for check in data["failures"] if "inside a save" in check)
    assert {check: found for check, found in data["failures"].items() if found and check != share} == {}
    assert len(data["kills"]) == NUM_KILLS
    assert len(data["rounds"]) == 1
    assert f"{NUM_KILLS} SIGKILLs in 1 runs" in chaos.format_results(data)
    again = chaos.run_benchmark(options)  # enough kills already: nothing is run again
    assert json.loads(json.dumps(again)) == json.loads(json.dumps(data))


def build_run(tmp_path: Path) -> chaos.KilledRun:
    run = chaos.KilledRun(Arm("killed", tmp_path / "no.yaml", (), tmp_path), NUM_KEPT)
    run.checkpoints.mkdir()
    return run


def test_only_this_launchs_traces_count(tmp_path: Path) -> None:
    run = build_run(tmp_path)
    (run.checkpoints / ".tmp-checkpoint_10").mkdir()
    (run.checkpoints / "checkpoint_5").mkdir()
    assert list(run.find_traces()) == [".tmp-checkpoint_10"]
    run.old_traces = run.find_traces()
    assert run.find_traces() == {}
    (run.checkpoints / ".replaced-checkpoint_5").mkdir()
    assert list(run.find_traces()) == [".replaced-checkpoint_5"]


def test_a_lost_checkpoint_is_noticed(tmp_path: Path) -> None:
    run = build_run(tmp_path)
    assert run.find_losses() == []
    run.committed = "checkpoint_10"
    (loss,) = run.find_losses()
    assert "checkpoint_10" in loss
    shutil.rmtree(run.checkpoints)
    assert run.find_traces() == {}


def test_the_verdict_counts_kills_that_left_evidence() -> None:
    kills = [{"traces": [".tmp-checkpoint_10"]}, {"traces": []}, {"traces": []}, {"traces": []}]
    record = {"kills": kills, "rounds": [{"failures": {"x": ["y"]}}], chaos.LOST: ["z"], chaos.RESUMED: []}
    failures = chaos.find_all_failures(record)
    assert failures["x"] == ["round 1: y"]
    assert failures[chaos.LOST] == ["z"]
    assert failures["at least 30% of the kills were inside a save"] == ["1 of 4"]


def test_a_checkpoint_that_made_room_for_newer_ones_is_not_lost(tmp_path: Path) -> None:
    run = build_run(tmp_path)
    for step in (10, 20, 30):
        tensors = {"model": {"weight": torch.full((2,), float(step))}}
        run.store.save(step, 1, tensors=tensors, torch_states={}, plain={"step": step}, is_best=False)
    run.committed, run.committed_at = "checkpoint_10", (1, 10)
    assert run.find_losses() == []
    shutil.rmtree(run.checkpoints / "checkpoint_30")
    (loss,) = run.find_losses()
    assert "checkpoint_10" in loss
