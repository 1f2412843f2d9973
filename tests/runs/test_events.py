"""The run's diary: whole lines, all digits, and a tail that neither loses nor doubles."""

from __future__ import annotations

import errno
import math
import os
import shutil
import struct
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cvm_translator.runs.events import EventTail, EventWriter, read_events, sum_stage_seconds

quick = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "logs" / "events.jsonl"


def test_every_event_has_the_common_fields(path: Path) -> None:
    with EventWriter(path) as events:
        events.write("run_started", run_id="x")
        events.buffer("train", step=3, attempt=2, loss=0.5)
    first, second = read_events(path)
    assert first.keys() == {"schema_version", "time", "kind", "step", "attempt", "run_id"}
    assert (first["step"], second["step"], second["attempt"], second["schema_version"]) == (None, 3, 2, 1)
    assert datetime.fromisoformat(first["time"]).utcoffset() == timedelta(0)


def test_an_unknown_kind_is_a_defect(path: Path) -> None:
    with EventWriter(path) as events, pytest.raises(AssertionError, match="trian"):
        events.write("trian")


@quick
@given(values=st.lists(st.floats(allow_nan=True, allow_infinity=True), max_size=20))
def test_losses_keep_every_bit(values: list[float], path: Path) -> None:
    path.unlink(missing_ok=True)
    with EventWriter(path) as events:
        for value in values:
            events.buffer("train", loss=value, nested={"list": [value]})
    for value, event in zip(values, read_events(path), strict=True):
        for found in (event["loss"], event["nested"]["list"][0]):
            if math.isfinite(value):
                assert struct.pack("d", found) == struct.pack("d", value)
            else:
                assert found == str(value)


def test_hostile_text_stays_on_its_line(path: Path) -> None:
    text = 'a\nb\r\x00\u2028"}\ud800{"kind": "failed"}'
    with EventWriter(path) as events:
        events.write("warning", message=text)
        events.write("stopped")
    assert path.read_bytes().count(b"\n") == 2
    assert [event["kind"] for event in read_events(path)] == ["warning", "stopped"]


def test_what_is_written_is_printable_ascii(path: Path) -> None:
    """So that whoever looks at the file as it is has no character act on the terminal."""
    text = "é \x1b[2J \x7f \x9b31m \u202e\u2028 \U0001f600 \ud800"
    with EventWriter(path) as events:
        events.write("warning", message=text, nested={text: [text]})
    written = path.read_bytes()
    assert written.endswith(b"\n") and written[:-1].decode("ascii").isprintable()
    (event,) = read_events(path)
    assert (event["message"], event["nested"]) == (text, {text: [text]})


def test_train_events_wait_for_the_next_other_event(path: Path) -> None:
    with EventWriter(path) as events:
        for step in range(3):
            events.buffer("train", step=step)
        assert path.read_bytes() == b""
        events.write("checkpoint", step=2)
        assert [event["kind"] for event in read_events(path)] == ["train"] * 3 + ["checkpoint"]
        events.buffer("train", step=3)
        events.flush(sync=True)
        assert len(list(read_events(path))) == 5


def test_listeners_hear_each_event_as_it_is_made(path: Path) -> None:
    heard: list[dict[str, Any]] = []
    with EventWriter(path) as events:
        events.listeners.append(heard.append)
        events.buffer("train", step=1, loss=math.nan)
        assert [event["loss"] for event in heard] == ["nan"]
        events.write("stopped")
    assert heard == list(read_events(path))


@pytest.mark.parametrize("torn", [b'{"kind": "train", "lo', b"\xff\xfe", b"[1]", b'{"step": 1}', b"null"])
def test_a_torn_line_is_closed_off_and_passed_over(torn: bytes, path: Path) -> None:
    with EventWriter(path) as events:
        events.write("run_started")
    with open(path, "ab") as stream:
        stream.write(torn)
    assert [event["kind"] for event in read_events(path)] == ["run_started"]
    with EventWriter(path) as events:
        events.write("resumed")
    assert [event["kind"] for event in read_events(path)] == ["run_started", "resumed"]
    tail = EventTail(path)
    assert [event["kind"] for event in tail.poll()] == ["run_started", "resumed"]
    tail.close()


def test_a_diary_that_was_rotated_is_read_whole_and_written_on(path: Path) -> None:
    """Somebody moves the file away under the writer, twice; and once keeps a copy that is no older part."""
    events, tail = EventWriter(path), EventTail(path)
    told = []
    for step in range(6):
        events.write("checkpoint", step=step)
        told += tail.poll() if step % 2 else []
        if step in (1, 3):
            for number in (1, 0):
                old = path.with_name(f"events.jsonl.{number}") if number else path
                if old.exists():
                    os.rename(old, path.with_name(f"events.jsonl.{number + 1}"))
    events.close()
    path.with_name("events.jsonl.bak").write_bytes(path.read_bytes())
    whole = list(read_events(path))
    assert [event["step"] for event in whole] == [event["step"] for event in told] == list(range(6))
    late = EventTail(path)
    assert late.poll() == whole
    late.close()
    path.with_name("events.jsonl.2").write_bytes(path.with_name("events.jsonl.1").read_bytes())
    assert [event["step"] for event in read_events(path)] == [2, 3, 4, 5]
    tail.close()


def test_a_writer_does_not_make_its_folder_again(path: Path) -> None:
    events = EventWriter(path)
    events.write("run_started")
    shutil.rmtree(path.parent)
    events.write("stopped")
    events.close()
    assert not path.parent.exists()


def test_a_missing_file_has_no_events(path: Path) -> None:
    assert list(read_events(path)) == []
    assert EventTail(path).poll() == []


def test_a_full_disk_tears_one_line_and_later_events_are_whole(path: Path) -> None:
    """/dev/full refuses every byte; a stream that takes some of them first tears the line."""
    events = EventWriter(path)
    events.write("run_started")
    stream = events._stream

    class FullAfterTen:
        def write(self, data: memoryview) -> int:
            stream.write(bytes(data[:10]))
            raise OSError(errno.ENOSPC, "No space left on device")

    events._stream = FullAfterTen()  # type: ignore[assignment]
    events.write("warning", message="kept until there is room")
    with pytest.raises(OSError, match="No space"):
        events.flush()
    events._stream = stream
    events.write("stopped")
    events.close()
    assert [event["kind"] for event in read_events(path)] == ["run_started", "warning", "stopped"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_closing_on_a_full_disk_raises_once_and_closes(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.symlink_to("/dev/full")
    events = EventWriter(path)
    events.write("run_started")
    events.buffer("train")
    with pytest.raises(OSError, match="No space"):
        events.close()
    assert events._stream.closed


# -------------------------------------------------------------------------------------------------------------- times


def test_stage_seconds_add_up_over_starts() -> None:
    """Killed after 5 s, stopped after 4 s, finished in 3 s; then found complete."""
    clock = datetime.fromisoformat("2030-01-01T00:00:00+00:00")

    def event(kind: str, second: float, **fields: Any) -> dict[str, Any]:
        return {"kind": kind, "time": (clock + timedelta(seconds=second)).isoformat()} | fields

    told = [
        event("run_started", 0, stages=["corpus", "distil"]),
        event("stage_started", 0, stage="corpus"),
        event("stage_finished", 2, stage="corpus", seconds=1.9, skipped=False),
        event("stage_started", 2, stage="distil"),
        event("train", 7),
        event("run_started", 1000),
        event("stage_started", 1000, stage="corpus"),
        event("stage_finished", 1001, stage="corpus", seconds=1.0, skipped=True),
        event("stage_started", 1001, stage="distil"),
        event("stopped", 1005),
        event("run_started", 2000),
        event("stage_started", 2000, stage="distil"),
        event("stage_finished", 2003, stage="distil", seconds=3.0, skipped=False),
        event("stage_started", 2003, stage="report"),
    ]
    assert sum_stage_seconds(told) == pytest.approx({"corpus": 1.9, "distil": 5.0 + 4.0 + 3.0})
