"""The quick instance of benchmarks/reliability/chaos.py: a few kills of a tiny run, some of them inside a save."""

from __future__ import annotations

import json
import os
import shutil
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.common import Arm
from benchmarks.reliability import chaos, chaos_run
from benchmarks.reliability.chaos_run import KilledRun, Position
from cvm_translator.runs.events import EventWriter

NUM_KILLS = 4
NUM_KEPT = 2
NAN = "fault_injection=[{kind: nan_loss, from_step: 70, num_steps: 3}]"


@pytest.fixture
def options(numbers: Any, tmp_path: Path) -> Namespace:
    config = numbers.write_config("chaos", teacher={"training": {"num_iterations": 60, "validate_every_steps": 60}})
    return Namespace(config=config, work=tmp_path, set=[], steps=[NAN], threads_per_arm=1, kills=NUM_KILLS, seed=13)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_few_kills_lose_nothing_and_change_no_bit(options: Namespace) -> None:
    data = chaos.run_benchmark(options)
    shortfalls = chaos.find_shortfalls(data["kills"])  # a few kills need not fall everywhere
    assert {check: found for check, found in data["failures"].items() if found and check not in shortfalls} == {}
    assert len(data["kills"]) == NUM_KILLS
    assert len(data["rounds"]) == 1
    assert data["rounds"][0]["compared"]["num_steps"]["distil"] > 160  # some were executed again after the rollback
    assert f"{NUM_KILLS} SIGKILLs in 1 runs" in chaos.format_results(data)
    again = chaos.run_benchmark(options)  # enough kills already: nothing is run again
    assert json.loads(json.dumps(again)) == json.loads(json.dumps(data))


# ---------------------------------------------------------------------------------------------- where a kill has fallen

TRACE = ".tmp-checkpoint_40"
LOOP = {"kind": "stage_started", "stage": "distil"}
RESUMED = {"kind": "resumed", "stage": "distil", "step": 30, "attempt": 1}
TRAINED = {"kind": "train", "stage": "distil", "step": 40, "attempt": 1, "skipped": False}
SKIPPED = TRAINED | {"skipped": True}
VERDICT = {"kind": "verdict", "stage": "distil", "step": 40, "best_step": 40, "attempt": 1, "action": "keep"}
WORSE = VERDICT | {"best_step": 20}
DEGRADED = WORSE | {"action": "roll_back"}
ROLLBACK = {"kind": "rollback", "stage": "distil", "step": 40, "attempt": 1}
SAVED = {"kind": "checkpoint", "stage": "distil", "step": 40, "attempt": 1, "is_best": True}
GATE = {"kind": "stage_started", "stage": "gate"}

FALLEN = [
    ([], [TRACE], "loading"),
    ([LOOP], [TRACE], "loading"),
    ([LOOP, RESUMED], [], "training"),
    ([LOOP, RESUMED], [TRACE], "save"),
    ([LOOP, RESUMED, TRAINED | {"step": 39}], [], "training"),
    ([LOOP, RESUMED, SKIPPED], [], "training"),
    ([LOOP, RESUMED, TRAINED], [], "validation"),
    ([LOOP, RESUMED, TRAINED | {"step": 90}], [], "validation"),
    ([LOOP, RESUMED, TRAINED, VERDICT], [], "training"),
    ([LOOP, RESUMED, TRAINED, VERDICT], [TRACE], "save of a best"),
    ([LOOP, RESUMED, TRAINED, WORSE], [TRACE], "save"),
    ([LOOP, RESUMED, TRAINED, DEGRADED], [], "rollback"),
    ([LOOP, RESUMED, TRAINED, DEGRADED], [".tmp-rollback.json-12ab"], "rollback"),
    ([LOOP, RESUMED, ROLLBACK], [], "rollback"),
    ([LOOP, RESUMED, ROLLBACK], [TRACE], "save"),
    ([LOOP, RESUMED, TRAINED, VERDICT, SAVED], [], "training"),
    ([LOOP, GATE], [], "gate"),
]


@pytest.mark.parametrize(("events", "traces", "expected"), FALLEN)
def test_the_phase_is_told_by_the_events_and_the_traces(
    events: list[dict[str, Any]], traces: list[str], expected: str
) -> None:
    position = Position(num_iterations=90, validate_every_steps=20)
    for event in events:
        position.take_in(event)
    assert position.find_phase(traces) == expected
    assert position.has_best == (SAVED in events)
    position.begin()
    assert position.find_phase(traces) == "loading"


def build_run(tmp_path: Path) -> KilledRun:
    arm = Arm("killed", tmp_path / "no.yaml", (), tmp_path)
    run = KilledRun(arm, NUM_KEPT, Position(num_iterations=90, validate_every_steps=20), {})
    run.store.directory.mkdir()
    return run


def test_traces_of_earlier_launches_and_of_the_recovery_from_them_do_not_count(tmp_path: Path) -> None:
    run = build_run(tmp_path)
    for name in (".tmp-removed-checkpoint_5", ".replaced-checkpoint_10", "checkpoint_5"):
        (run.store.directory / name).mkdir()
    assert run.find_traces() == []
    run.position.take_in(RESUMED)
    assert run.find_traces() == [".replaced-checkpoint_10", ".tmp-removed-checkpoint_5"]
    run.position.begin()
    assert run.find_traces() == []
    shutil.rmtree(run.store.directory)
    run.position.take_in(RESUMED)
    assert run.find_traces() == []


def test_what_was_done_before_is_no_progress(tmp_path: Path) -> None:
    run = build_run(tmp_path)
    with EventWriter(tmp_path / "logs" / "events.jsonl") as events:
        events.write("stage_finished", stage="corpus", seconds=1.0, skipped=True, summary={})
        events.write("stage_finished", stage="teacher", seconds=1.0, skipped=False, summary={})
        for _ in range(2):
            events.write("checkpoint", step=10, stage="distil", path="checkpoint_10", is_best=True, seconds=0.5)
        run.follow()
    run.tail.close()
    assert run.num_advances == 2
    assert run.announced == {"checkpoint_10": (1, 10)}
    assert run.announced_best == (1, 10)
    assert run.seconds == {"save": 0.5}


# ------------------------------------------------------------------------------------------------------- what is a loss


def save(run: KilledRun, step: int, *, is_best: bool = False, is_told: bool = True) -> Path:
    tensors = {"model": {"weight": torch.full((2,), float(step))}}
    saved = run.store.save(step, 1, tensors=tensors, torch_states={}, plain={"step": step}, is_best=is_best)
    if is_told:
        run.announced[saved.path.name] = (1, step)
        run.announced_best = (1, step) if is_best else run.announced_best
    return saved.path


@pytest.fixture
def saved_run(tmp_path: Path) -> KilledRun:
    """Checkpoints 20 (the best), 30 and 40; 10 has made room."""
    run = build_run(tmp_path)
    assert run.find_losses() == []
    for step in (10, 20, 30, 40):
        save(run, step, is_best=step == 20)
    assert run.find_losses() == []
    return run


def test_a_checkpoint_that_is_gone_is_a_loss(saved_run: KilledRun) -> None:
    shutil.rmtree(saved_run.store.directory / "checkpoint_30")
    assert saved_run.find_losses() == ["checkpoint_30 is not there any more"]


def test_a_damaged_checkpoint_is_a_loss(saved_run: KilledRun) -> None:
    (saved_run.store.directory / "checkpoint_20" / "state.json").write_text("{}")
    damaged, dangling = saved_run.find_losses()
    assert "checkpoint_20 is damaged: state.json" in damaged
    assert dangling == "best_model points to checkpoint_20, which does not verify"


def test_a_best_that_goes_back_is_a_loss(saved_run: KilledRun) -> None:
    saved_run.announced_best = (1, 40)
    assert saved_run.find_losses() == ["best_model went back to checkpoint_20"]
    os.unlink(saved_run.store.directory / "best_model")
    assert saved_run.find_losses() == ["best_model is not there any more"]


def test_newer_ones_of_which_no_event_was_written_are_no_loss(saved_run: KilledRun) -> None:
    save(saved_run, 50, is_best=True, is_told=False)
    save(saved_run, 60, is_told=False)
    assert saved_run.store.names() == ["checkpoint_60", "checkpoint_50"]
    assert saved_run.find_losses() == []


def test_one_that_stands_aside_while_it_is_replaced_is_no_loss(saved_run: KilledRun) -> None:
    directory = saved_run.store.directory
    os.rename(directory / "checkpoint_40", directory / ".replaced-checkpoint_40")
    assert saved_run.find_losses() == []


# ------------------------------------------------------------------------------------------------------------- verdicts


def note(run: KilledRun, tmp_path: Path, *, exit_code: int, is_killed: bool = False) -> dict[str, Any]:
    """What is recorded of a launch that began with checkpoint 40."""
    record = chaos.Record(tmp_path / "kills.json", seed=1)
    run.process = SimpleNamespace(exitcode=exit_code)
    chaos.look(run, record, (1, 40), is_killed=is_killed)
    return record.data


@pytest.mark.parametrize(("exit_code", "num_failures"), [(0, 0), (5, 0), (1, 1), (-9, 1)])
def test_a_process_that_dies_by_itself_is_a_failure(
    saved_run: KilledRun, tmp_path: Path, exit_code: int, num_failures: int
) -> None:
    assert len(note(saved_run, tmp_path, exit_code=exit_code)[chaos.ENDED]) == num_failures


def test_a_killed_process_is_none(saved_run: KilledRun, tmp_path: Path) -> None:
    assert note(saved_run, tmp_path, exit_code=-9, is_killed=True)[chaos.ENDED] == []


@pytest.mark.parametrize(
    ("step", "exact", "num_failures"), [(40, True, 0), (50, True, 0), (30, True, 1), (40, False, 1)]
)
def test_the_resume_is_compared_with_what_there_was_before_the_launch(
    saved_run: KilledRun, tmp_path: Path, step: int, exact: bool, num_failures: int
) -> None:
    save(saved_run, 60)  # by the launch itself, after its resume
    saved_run.resumed = [{"step": step, "attempt": 1, "exact": exact, "differences": []}]
    saved_run.position.take_in(RESUMED)
    assert len(note(saved_run, tmp_path, exit_code=0)[chaos.RESUMED]) == num_failures


def test_a_loop_that_begins_anew_is_a_failure(saved_run: KilledRun, tmp_path: Path) -> None:
    saved_run.position.take_in(SAVED)
    assert len(note(saved_run, tmp_path, exit_code=0)[chaos.RESUMED]) == 1


def test_the_verdict_asks_where_the_kills_fell() -> None:
    killed = [("save", 0.1), ("save of a best", 0.3), ("validation", 0.6), ("gate", 1.0), *[("training", 0.6)] * 6]
    kills = [{"phase": phase, "progress": progress, "has_best": progress > 0.5} for phase, progress in killed]
    record = {"kills": kills, "rounds": [{"failures": {"x": ["y"]}}], chaos.LOST: ["z"], chaos.RESUMED: []}
    failures = chaos.find_all_failures(record | {chaos.ENDED: []})
    assert failures["x"] == ["round 1: y"]
    assert failures[chaos.LOST] == ["z"]
    assert {check: found for check, found in chaos.find_shortfalls(kills).items() if found} == {
        "at least 3 of 10 kills inside a save": ["2 kills"],
        "at least 1 of 10 kills in part 4 of 4 of the steps": ["0 kills"],
    }


def test_every_aim_has_its_share() -> None:
    assert sum(share for share, *_ in chaos.AIMS.values()) == pytest.approx(1.0)
    assert {*chaos.SAVES, *chaos_run.LATE_STAGES} < {*chaos_run.PHASES}
