"""A real run under its supervisor: the trainer is killed, then the supervisor."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cvm_translator.runs.events import EventTail
from cvm_translator.runs.layout import RunLayout
from cvm_translator.runs.lock import read_holder

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


class Background:
    """A run in the background, followed by its events."""

    def __init__(self, numbers: Any, run_dir: Path, *command: str | Path) -> None:
        end = numbers.run(*command)
        assert end.exit_code == 0, end.errors
        match = re.search(r"process id: (\d+)", end.output)
        assert match is not None
        self.layout, self.supervisor = RunLayout(run_dir), int(match[1])
        self._tail = EventTail(self.layout.events)
        self.seen: list[dict[str, Any]] = []

    def wait_for(self, is_reached: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            for event in self._tail.poll():
                self.seen.append(event)
                if is_reached(event):
                    return event
            time.sleep(0.01)
        raise AssertionError(f"not reached: {self.seen[-5:]}")

    @property
    def trainer(self) -> int:
        holder = read_holder(self.layout.lock)
        assert holder is not None
        return int(holder["pid"])

    def close(self) -> None:
        self._tail.close()
        holder = read_holder(self.layout.supervisor_lock)
        if holder is not None:
            os.kill(holder["pid"], signal.SIGKILL)


def checkpoint(step: int) -> Callable[[dict[str, Any]], bool]:
    return lambda e: e["kind"] == "checkpoint" and e["stage"] == "teacher" and e["step"] >= step


def test_a_supervised_run(numbers: Any, tmp_path: Path) -> None:
    """It obeys requests; the trainer is killed and started again; its supervisor is killed, and it saves and leaves."""
    folder = tmp_path / "run"
    config = numbers.write_config("supervised", teacher={"training": {"num_iterations": 20_000}})
    run = Background(numbers, folder, "start", config, "--output-dir", folder)
    try:
        run.wait_for(checkpoint(15))
        # ------------------------------------------------------------------------------------------- asked for things
        answers = {action: numbers.run("control", action, folder) for action in ("validate", "pause")}
        assert [end.exit_code for end in answers.values()] == [0, 0], answers
        assert "validated for the record" in answers["validate"].output
        status = json.loads(numbers.run("status", folder, "--json").output)
        assert (status["state"], status["supervisor_pid"], status["pid"]) == ("paused", run.supervisor, run.trainer)
        assert numbers.run("control", "continue", folder).exit_code == 0
        run.wait_for(checkpoint(status["step"] + 15))
        # -------------------------------------------------------------------------------------------------- killed
        first = run.trainer
        assert first != run.supervisor
        os.kill(first, signal.SIGKILL)
        restart = run.wait_for(lambda e: e["kind"] == "warning" and e["code"] == "restart")
        assert (restart["signal"], restart["stage"]) == (9, "teacher")
        resumed = run.wait_for(lambda e: e["kind"] == "resumed")
        assert resumed["exact"]
        run.wait_for(checkpoint(resumed["step"] + 15))
        # ------------------------------------------------------------------------------------------------ orphaned
        assert run.trainer != first
        os.kill(run.supervisor, signal.SIGKILL)
        stopped = run.wait_for(lambda e: e["kind"] == "stopped")
        assert (stopped["signal"], stopped["reason"]) == (15, "the supervisor is gone")
    finally:
        run.close()
    saved, executed = ([e["step"] for e in run.seen if e["kind"] == kind] for kind in ("checkpoint", "train"))
    assert saved[-1] == executed[-1]
    asked = [e for e in run.seen if e["kind"] == "validation" and e["asked"]]
    assert [e["stage"] for e in asked] == ["teacher"]
    assert (folder / f"teacher/validation/asked/step_{asked[0]['step']}.json").exists()
    losses: dict[int, set[float]] = {}
    for event in run.seen:
        if event["kind"] == "train":
            losses.setdefault(event["step"], set()).add(event["loss"])
    assert all(len(values) == 1 for values in losses.values())
    assert read_holder(run.layout.supervisor_lock) is None
