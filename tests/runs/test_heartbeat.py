"""The trainer's end of the pipe: never blocks, never fails, and notices when nobody listens any more."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from cvm_translator.runs.heartbeat import ENVIRONMENT, Beat, Heartbeat, is_supervised, parse_beat


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    read, write = os.pipe()
    yield read, write
    os.close(read)
    os.close(write)


def test_a_beat_carries_stage_step_and_attempt(pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENVIRONMENT, f"{pipe[1]}:3")
    assert is_supervised()
    heartbeat = Heartbeat.from_environment()
    assert (heartbeat.is_supervised, heartbeat.num_restarts, is_supervised()) == (True, 3, False)
    heartbeat.beat("begun")
    heartbeat.beat("step", stage="distil", step=120, attempt=2)
    heartbeat.beat("validation")
    assert [parse_beat(line) for line in os.read(pipe[0], 1000).splitlines()] == [
        Beat("begun", None, 0, 1),
        Beat("step", "distil", 120, 2),
        Beat("validation", "distil", 120, 2),
    ]
    assert not os.get_inheritable(pipe[1])


def test_a_full_pipe_holds_nobody_up(pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENVIRONMENT, f"{pipe[1]}:0")
    heartbeat = Heartbeat.from_environment()
    for step in range(20_000):
        heartbeat.beat("step", stage="distil", step=step)
    assert heartbeat.is_supervised


def test_without_a_reader_it_tells_once(pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENVIRONMENT, f"{pipe[1]}:0")
    heartbeat, told = Heartbeat.from_environment(), []
    heartbeat.on_gone = lambda: told.append(1)
    with open(os.devnull, "rb") as other:
        os.dup2(other.fileno(), pipe[0])  # closes the reading end
    heartbeat.beat("step")
    heartbeat.beat("step")
    assert told == [1]


@pytest.mark.parametrize("given", ["", "7", "1:2:3", "many:0", "99999:0", "file:0"])
def test_what_is_no_pipe_is_no_supervisor(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with open(os.devnull, "wb") as stream:
        monkeypatch.setenv(ENVIRONMENT, given.replace("file", str(stream.fileno())))
        heartbeat = Heartbeat.from_environment()
        heartbeat.beat("step")
    assert not heartbeat.is_supervised


@pytest.mark.parametrize("line", [b"", b"step", b"step distil x 1", b"dance distil 1 1", b"step distil 1", b"\xff\xfe"])
def test_a_torn_line_is_no_beat(line: bytes) -> None:
    assert parse_beat(line) is None
