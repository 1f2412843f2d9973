"""A run whose scores are computed beside training, killed and stopped meanwhile: the models of the one that waits."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from benchmarks import scoring as benchmark
from cvm_translator.runs.events import read_events

# The first test to ask for the reference run waits for it; so do those beside it on a busy machine.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def beside(numbers: Any, whole_run: Any, await_event: Any) -> Path:
    """Ended twice as soon as a validated checkpoint that awaits its verdict is saved."""
    config, folder = numbers.write_config("beside", score_beside_training=True), numbers.folder / "beside"
    for start, (stage, step, number) in enumerate([("teacher", 60, signal.SIGKILL), ("distil", 80, signal.SIGTERM)]):
        program = (
            numbers.start("resume", folder, "--foreground", "--no-progress")
            if start
            else numbers.start_run(config, folder)
        )
        await_event(
            folder,
            program,
            lambda e: (e["kind"], e.get("stage"), e["step"]) == ("checkpoint", stage, step),  # noqa: B023
        )
        program.send(number)
        assert program.finish().exit_code == (143 if number == signal.SIGTERM else -9)
    finished = numbers.run("resume", folder, "--foreground", "--no-progress")
    assert finished.exit_code == 0, finished.errors
    return folder


def test_it_says_so(beside: Path) -> None:
    assert yaml.safe_load((beside / "config.yaml").read_text())["score_beside_training"] is True
    assert "scores are computed beside training, by a process of" in (beside / "logs" / "train.log").read_text()


@pytest.mark.parametrize("name", ["teacher/model", "student/float", "student/int8"])
def test_the_models_are_the_same_bytes(name: str, beside: Path, whole_run: Any) -> None:
    ours, theirs = beside / name / "model.safetensors", whole_run.folder / name / "model.safetensors"
    assert ours.read_bytes() == theirs.read_bytes()


def test_verdicts_are_the_same_and_came_later(beside: Path, whole_run: Any, find_event_problems: Any) -> None:
    events = list(read_events(beside / "logs" / "events.jsonl"))
    assert find_event_problems(events) == []
    newest, delays = 0, {}
    for event in events:
        if event["kind"] == "train":
            newest = event["step"]
        elif event["kind"] == "verdict":
            delays[event["stage"], event["step"]] = newest - event["step"]
    assert delays == {("teacher", 60): 6, ("teacher", 120): 0} | {("distil", s): 4 for s in (40, 80, 120)} | {
        ("distil", 160): 0
    }

    def told(folder: Path) -> set[tuple[Any, ...]]:
        verdicts = [e for e in read_events(folder / "logs" / "events.jsonl") if e["kind"] == "verdict"]
        return {(e["stage"], e["step"], e["verdict"], e["reason"], e["best_step"]) for e in verdicts}

    assert told(beside) == told(whole_run.folder)


@pytest.mark.parametrize("name", benchmark.ARMS)
def test_the_benchmark_s_arms(name: str, whole_run: Any) -> None:
    num_threads = torch.get_num_threads()
    try:
        seconds = benchmark.run_worker(name, whole_run.folder, num_steps=3, num_cores=2)
    finally:
        torch.set_num_threads(num_threads)
    assert seconds["alone"] > 0
    assert seconds["scored"] > 0
