"""The control file: no request is lost, none is obeyed twice, and nothing in it can end a run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cvm_translator.runs import control
from cvm_translator.runs.control import ControlFile, submit
from cvm_translator.runs.events import EventWriter


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(control, "LOOK_EVERY_SECONDS", 0.0)
    return tmp_path / "control.json"


def actions(reader: ControlFile) -> list[str]:
    return [request.action for request in reader.poll()]


def test_requests_come_once_and_in_order(path: Path) -> None:
    reader = ControlFile(path)
    assert actions(reader) == []
    submit(path, "pause")
    submit(path, "continue")
    assert actions(reader) == ["pause", "continue"]
    assert actions(reader) == []
    submit(path, "stop")
    assert actions(reader) == ["stop"]
    assert reader.take_problem() is None


def test_writers_at_once_lose_nothing(path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from cvm_translator.runs.control import submit;"
        "[submit(Path(sys.argv[1]), f'{sys.argv[2]}-{n}') for n in range(8)]"
    )
    writers = [subprocess.Popen([sys.executable, "-c", code, str(path), str(number)]) for number in range(4)]
    assert [writer.wait() for writer in writers] == [0] * 4
    assert sorted(actions(ControlFile(path))) == sorted(f"{w}-{n}" for w in range(4) for n in range(8))


def test_only_the_newest_requests_are_kept(path: Path) -> None:
    for number in range(control.NUM_KEPT + 3):
        submit(path, str(number))
    assert actions(ControlFile(path)) == [str(number) for number in range(3, control.NUM_KEPT + 3)]


def test_a_start_that_somebody_asked_for_passes_over_what_is_old(path: Path, tmp_path: Path) -> None:
    identity = submit(path, "stop")
    reader = ControlFile(path)
    assert [request.id for request in reader.begin(tmp_path / "events.jsonl", is_restart=False)] == [identity]
    submit(path, "pause")
    assert actions(reader) == ["pause"]


def test_a_restart_obeys_what_was_not_answered(path: Path, tmp_path: Path) -> None:
    answered, events = submit(path, "checkpoint"), tmp_path / "events.jsonl"
    submit(path, "validate")
    with EventWriter(events) as writer:
        writer.write("control", id=answered, action="checkpoint", result="done")
    reader = ControlFile(path)
    assert reader.begin(events, is_restart=True) == []
    assert actions(reader) == ["validate"]


GOOD = {"id": "a", "action": "pause"}


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"", "Expecting value"),
        (b'{"requests": [', "Expecting value"),
        (b"\xff\xfe\x00", "decode"),
        (b"[]", "no list of requests"),
        (b'{"requests": {"id": 1}}', "no list of requests"),
        (b"[" * 60_000, "nested too deeply"),
        (b" " * 70_000, "larger than"),
    ],
)
def test_a_file_that_cannot_be_used_is_told_of_once(data: bytes, problem: str, path: Path) -> None:
    reader = ControlFile(path)
    path.write_bytes(data)
    assert actions(reader) == []
    assert problem in str(reader.take_problem())
    assert actions(reader) == []
    assert reader.take_problem() is None
    submit(path, "pause")
    assert actions(reader) == ["pause"]


@pytest.mark.parametrize(
    "bad",
    [
        *[None, 7, [], {}, {"id": "b"}, {"id": 7, "action": "stop"}, {"id": "../x y", "action": "stop"}],
        *[{"id": "b" * 65, "action": "stop"}, {"id": "b", "action": ["stop"]}, {"id": "b", "action": "s" * 65}],
    ],
)
def test_a_bad_request_spoils_no_good_one(bad: object, path: Path) -> None:
    reader = ControlFile(path)
    path.write_text(json.dumps({"requests": [bad, GOOD]}))
    assert actions(reader) == ["pause"]
    assert "1 requests without a proper id and action" in str(reader.take_problem())


def test_what_is_no_plain_file_is_not_read(path: Path) -> None:
    reader = ControlFile(path)
    path.symlink_to("/dev/zero")
    assert actions(reader) == []
    assert reader.take_problem() is not None
    path.unlink()
    os.mkfifo(path)
    assert actions(reader) == []
    assert "not a plain file" in str(reader.take_problem())


def test_between_two_looks_only_the_clock_is_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "LOOK_EVERY_SECONDS", 3600.0)
    reader = ControlFile(path)
    assert actions(reader) == []
    submit(path, "pause")
    monkeypatch.setattr(os, "stat", lambda *_, **__: pytest.fail("looked"))
    assert [actions(reader) for _ in range(100)] == [[]] * 100
