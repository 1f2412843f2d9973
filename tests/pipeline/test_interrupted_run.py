"""The same run, killed, stopped and damaged again and again: it ends with the same losses and the same bytes."""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from cvm_translator.checkpoints import CheckpointStore, load_checkpoint
from cvm_translator.runs.events import read_events

# The first test to ask for the reference run waits for it; so do those beside it on a busy machine.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@dataclasses.dataclass(frozen=True)
class Interrupted:
    """The run folder after all its interruptions, and what each start of it left."""

    folder: Path
    ends: dict[str, Any]
    loadable: dict[str, list[int]]
    """Steps of the checkpoints that could be loaded right after a stop."""
    second_start: Any
    damaged: str


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 16
    path.write_bytes(data)


def saved(stage: str, step: int) -> Callable[[dict[str, Any]], bool]:
    return lambda e: e["kind"] == "checkpoint" and e["stage"] == stage and e["step"] >= step


def finished(stage: str) -> Callable[[dict[str, Any]], bool]:
    return lambda e: e["kind"] == "stage_finished" and e["stage"] == stage and not e["skipped"]


def steps_of(folder: Path) -> list[int]:
    return [load_checkpoint(folder / name).step for name in CheckpointStore(folder, report=print).names()]


@pytest.fixture(scope="module")
def interrupted(numbers: Any, whole_run: Any, await_event: Callable[..., None]) -> Interrupted:
    """Interrupt at seeded moments between checkpoints: mid-epoch, mid-accumulation, maybe mid-save."""
    folder = numbers.folder / "interrupted_run"
    moments = random.Random(11)
    ends: dict[str, Any] = {}
    loadable: dict[str, list[int]] = {}
    second_start = damaged = None
    plan = [
        ("killed in the teacher", saved("teacher", 15), signal.SIGKILL),
        ("interrupted in the teacher", saved("teacher", 60), signal.SIGINT),
        ("killed in the student", saved("distil", 10), signal.SIGKILL),
        ("terminated in the student", saved("distil", 40), signal.SIGTERM),
        ("killed before the damage", saved("distil", 70), signal.SIGKILL),
        ("killed after the student", finished("quantise"), signal.SIGKILL),
    ]
    for name, is_reached, number in plan:
        if second_start is None:
            program = numbers.start_run(whole_run.config, folder)
        else:
            program = numbers.start("resume", folder, "--foreground", "--no-progress")
        await_event(folder, program, is_reached)
        if second_start is None:
            second_start = numbers.start_run(whole_run.config, folder).finish()
        time.sleep(moments.uniform(0.0, 0.2))
        program.send(number)
        ends[name] = program.finish()
        if number != signal.SIGKILL:
            store = folder / ("teacher/checkpoints" if "teacher" in name else "checkpoints")
            loadable[name] = steps_of(store)
        if name == "killed before the damage":
            damaged = CheckpointStore(folder / "checkpoints", report=print).names()[0]
            flip_a_bit(folder / "checkpoints" / damaged / "optimizer.pt")
    assert second_start is not None
    assert damaged is not None
    return Interrupted(folder, ends, loadable, second_start, damaged)


def losses(folder: Path) -> dict[tuple[str, int, int], set[float]]:
    """Every loss that was told, by stage, attempt and executed step."""
    told: dict[tuple[str, int, int], set[float]] = {}
    for event in read_events(folder / "logs" / "events.jsonl"):
        if event["kind"] == "train":
            told.setdefault((event["stage"], event["attempt"], event["executed_step"]), set()).add(event["loss"])
    return told


def test_every_step_has_one_loss_and_it_is_the_uninterrupted_runs(interrupted: Interrupted, whole_run: Any) -> None:
    expected = losses(whole_run.folder)
    assert len(expected) == 120 + 160
    assert losses(interrupted.folder) == expected


@pytest.mark.parametrize("name", ["teacher/model", "student/float", "student/int8"])
def test_the_models_are_the_same_bytes(name: str, interrupted: Interrupted, whole_run: Any) -> None:
    ours, theirs = interrupted.folder / name / "model.safetensors", whole_run.folder / name / "model.safetensors"
    assert ours.read_bytes() == theirs.read_bytes()


def test_validations_and_verdicts_are_the_same(interrupted: Interrupted, whole_run: Any) -> None:
    def told(folder: Path, kind: str, *fields: str) -> set[str]:
        events = read_events(folder / "logs" / "events.jsonl")
        return {json.dumps([e[f] for f in ("stage", "step", *fields)]) for e in events if e["kind"] == kind}

    for kind, fields in (("validation", ("scores", "quality_score", "probes")), ("verdict", ("verdict", "best_step"))):
        assert told(interrupted.folder, kind, *fields) == told(whole_run.folder, kind, *fields)
    for path in (whole_run.folder / "validation").glob("*.hypotheses.txt"):
        assert (interrupted.folder / "validation" / path.name).read_bytes() == path.read_bytes()


def test_every_resume_was_exact(interrupted: Interrupted, find_event_problems: Any) -> None:
    events = list(read_events(interrupted.folder / "logs" / "events.jsonl"))
    assert find_event_problems(events) == []
    resumed = [e for e in events if e["kind"] == "resumed"]
    assert len(resumed) == 5
    assert all(event["exact"] and event["differences"] == [] for event in resumed)


@pytest.mark.parametrize(
    ("name", "exit_code", "line"),
    [
        ("interrupted in the teacher", 130, "stopped by SIGINT: everything is saved"),
        ("terminated in the student", 143, "stopped by SIGTERM: everything is saved"),
    ],
)
def test_a_signal_saves_and_leaves(name: str, exit_code: int, line: str, interrupted: Interrupted) -> None:
    end = interrupted.ends[name]
    assert (end.exit_code, end.errors.splitlines()) == (exit_code, [line])
    stopped = [e["signal"] for e in read_events(interrupted.folder / "logs" / "events.jsonl") if e["kind"] == "stopped"]
    assert exit_code - 128 in stopped
    assert interrupted.loadable[name]


def test_what_was_saved_at_a_stop_is_where_it_goes_on(interrupted: Interrupted) -> None:
    events = list(read_events(interrupted.folder / "logs" / "events.jsonl"))
    for place, event in enumerate(events):
        if event["kind"] == "stopped":
            saved_step = next(e["step"] for e in reversed(events[:place]) if e["kind"] == "checkpoint")
            resumed_step = next(e["step"] for e in events[place:] if e["kind"] == "resumed")
            assert resumed_step == saved_step


def test_kills_were_kills(interrupted: Interrupted) -> None:
    killed = [end for name, end in interrupted.ends.items() if name.startswith("killed")]
    assert [end.exit_code for end in killed] == [-signal.SIGKILL] * 4


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(interrupted: Interrupted) -> None:
    events = list(read_events(interrupted.folder / "logs" / "events.jsonl"))
    warnings = [e["message"] for e in events if e["kind"] == "warning" and e["code"] == "checkpoint"]
    assert len(warnings) == 1
    assert f"{interrupted.damaged} is damaged" in warnings[0]
    assert "optimizer.pt" in warnings[0]
    resumed = [e["step"] for e in events if e["kind"] == "resumed"]
    assert resumed[-1] < int(interrupted.damaged.removeprefix("checkpoint_"))


def test_a_second_start_is_refused_and_told_by_whom(interrupted: Interrupted) -> None:
    refused = interrupted.second_start
    assert refused.exit_code == 1
    (line,) = refused.errors.splitlines()
    assert line.startswith(f"error: {interrupted.folder} is in use by process ")
    assert "cvm-translator stop" in line


def test_resume_of_a_finished_run_finds_nothing_to_do(numbers: Any, whole_run: Any, tmp_path: Path) -> None:
    folder = tmp_path / "moved"
    shutil.copytree(whole_run.folder, folder, symlinks=True)
    end = numbers.run("resume", folder, "--foreground", "--no-progress")
    assert (end.exit_code, end.errors) == (0, "")
    report = json.loads((folder / "reports/final_report.json").read_text())
    assert report == whole_run.read_json("reports/final_report.json")


def test_a_run_of_a_version_that_lacked_a_setting_goes_on(numbers: Any, whole_run: Any, tmp_path: Path) -> None:
    """Its config has no word of the setting, whose default is what that version did."""
    folder = tmp_path / "old"
    shutil.copytree(whole_run.folder, folder, symlinks=True)
    config = yaml.safe_load((folder / "config.yaml").read_text())
    del config["distillation"]["divergence"], config["student"]["model"]["core_capacity"]
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    end = numbers.run("resume", folder, "--foreground", "--no-progress")
    assert (end.exit_code, end.errors) == (0, "")


def test_a_signal_in_the_gate_leaves_at_once(
    numbers: Any, whole_run: Any, await_event: Callable[..., None], tmp_path: Path
) -> None:
    """Outside the loops there is nothing to save: what is complete is recorded, and the stage is begun anew."""
    folder = tmp_path / "copy"
    shutil.copytree(whole_run.folder, folder, symlinks=True)
    (folder / "stages/gate.json").unlink()
    starts: list[int] = []

    def in_the_new_gate(event: dict[str, Any]) -> bool:
        if event["kind"] == "run_started":
            starts.append(event["pid"])
        return len(starts) == 2 and event["kind"] == "stage_started" and event["stage"] == "gate"

    program = numbers.start_run(whole_run.config, folder)
    await_event(folder, program, in_the_new_gate)
    time.sleep(0.3)
    program.send(signal.SIGTERM)
    end = program.finish()
    assert (end.exit_code, end.errors.splitlines()) == (143, ["stopped by SIGTERM: everything is saved"])
    assert [e["signal"] for e in read_events(folder / "logs" / "events.jsonl") if e["kind"] == "stopped"] == [15]
