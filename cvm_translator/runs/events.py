"""The run's diary: one JSON object a line, appended and never changed.

Guarantees: every event carries `schema_version`, `time` (UTC, ISO 8601), `kind`, `step` and `attempt`. Numbers are
written with all their digits, so the losses of a replayed step can be compared bit for bit; a number that JSON cannot
hold (NaN, infinity) is written as a string. Text is escaped: a line is printable ASCII, and shown as it is it acts on
no terminal. A line torn by a crash or a full disk is closed off by the next write, and readers pass over it; what a
full disk refused is kept and written when there is room. No secret that this process has read is written. What each
kind holds is written down in `events.schema.json` (see `schema`).

The diary is never rotated by us: status, reports and a resume read the whole of it. Where somebody else rotates it
(`events.jsonl.1`, `.2` …), the writer goes on in the new file and readers read the numbered ones as well.

Per-step `train` events are buffered and written together with the next other event or at `flush`.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

from cvm_translator.errors import is_full_disk
from cvm_translator.runs.secrets import redact
from cvm_translator.runs.tail import FileTail, generation_paths

SCHEMA_VERSION = 1

KINDS = (
    "run_started",
    "stage_started",
    "stage_finished",
    "train",
    "progress",
    "validation",
    "verdict",
    "checkpoint",
    "rollback",
    "warning",
    "stopped",
    "resumed",
    "failed",
    "run_finished",
    "control",
    "paused",
    "continued",
)


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


class EventWriter:
    """Appends events to a file; the one writer is the holder of the run's lock."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._open()
        self._buffer: list[bytes] = []
        self.listeners: list[Callable[[dict[str, Any]], None]] = []
        """Called with each event as it is made: the log, the progress display and TensorBoard hang on here."""

    def _open(self) -> None:
        self._stream = open(self.path, "ab", buffering=0)  # noqa: SIM115 (lives as long as the writer)
        status = os.fstat(self._stream.fileno())
        self._identity = (status.st_dev, status.st_ino)
        self._is_torn = self._stream.tell() > 0 and not _ends_with_newline(self.path)

    def _follow_rotation(self) -> None:
        """Go over to the new file where somebody moved the old one away; its folder is not made again."""
        try:
            status = os.stat(self.path)
        except FileNotFoundError:
            if not self.path.parent.is_dir():
                return
        else:
            if (status.st_dev, status.st_ino) == self._identity:
                return
        self._stream.close()
        self._open()

    def write(self, kind: str, *, step: int | None = None, attempt: int = 1, **fields: Any) -> None:
        """Append one event and everything buffered before it; where there is no room they wait for the next write."""
        self.buffer(kind, step=step, attempt=attempt, **fields)
        try:
            self.flush()
        except OSError as error:
            if not is_full_disk(error):
                raise

    @property
    def is_behind(self) -> bool:
        """Whether events are waiting, to be written with the next ones or when there is room."""
        return bool(self._buffer)

    def buffer(self, kind: str, *, step: int | None = None, attempt: int = 1, **fields: Any) -> None:
        """Keep one event for the next `write` or `flush`."""
        assert kind in KINDS, kind
        time = datetime.now(UTC).isoformat(timespec="milliseconds")
        event = {"schema_version": SCHEMA_VERSION, "time": time, "kind": kind, "step": step, "attempt": attempt}
        event |= _plain(fields)
        line = json.dumps(event, ensure_ascii=True, allow_nan=False, default=str).replace("\x7f", "\\u007f")
        if (clean := redact(line)) != line:
            line, event = clean, json.loads(clean)
        self._buffer.append(line.encode("ascii") + b"\n")
        for listener in self.listeners:
            listener(event)

    def flush(self, *, sync: bool = False) -> None:
        """Hand buffered events to the operating system; with `sync`, to the disk.

        Raises OSError where there is no room; the events that did not fit stay for the next time.
        """
        if self._buffer:
            self._append()
        if sync:
            os.fsync(self._stream.fileno())

    def _append(self) -> None:
        """Write what is buffered; of a line that was torn half-way the whole is kept."""
        self._follow_rotation()
        data, num_written = memoryview(b"".join(self._buffer)), 0
        was_torn, self._is_torn = self._is_torn, True
        try:
            if was_torn:
                self._stream.write(b"\n")
            while num_written < len(data):
                num_written += self._stream.write(data[num_written:])
            self._is_torn = False
        finally:
            self._buffer = _drop_written(self._buffer, num_written)

    def close(self) -> None:
        try:
            self.flush(sync=True)
        finally:
            self._stream.close()

    def __enter__(self) -> EventWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def _drop_written(lines: list[bytes], num_bytes: int) -> list[bytes]:
    """The lines that are not wholly among the first so many bytes."""
    for place, line in enumerate(lines):
        num_bytes -= len(line)
        if num_bytes < 0:
            return lines[place:]
    return []


def _ends_with_newline(path: Path) -> bool:
    with open(path, "rb") as stream:
        stream.seek(-1, os.SEEK_END)
        return stream.read(1) == b"\n"


def parse_event(line: bytes) -> dict[str, Any] | None:
    """The event of one line, or None for a torn or foreign one."""
    try:
        event = json.loads(line)
    except ValueError:
        return None
    return event if isinstance(event, dict) and "kind" in event else None


def read_events(path: Path) -> Iterator[dict[str, Any]]:
    """All whole events of a diary, oldest first, those of its rotated files included; a missing file has none."""
    for line in read_lines(path):
        if (event := parse_event(line)) is not None:
            yield event


def read_lines(path: Path) -> Iterator[bytes]:
    """The whole lines of a file and of its rotated ones, oldest first; a torn line at an end is left out."""
    for part in generation_paths(path):
        with open(part, "rb") as stream:
            for line in stream:
                if line.endswith(b"\n"):
                    yield line.strip(b"\0")


def sum_stage_seconds(events: Iterable[dict[str, Any]]) -> dict[str, float]:
    """Seconds of work in each stage, over all starts of the run.

    A start that ended within a stage counts up to its last event; a stage that was found complete counts nothing.
    """
    seconds: dict[str, float] = {}
    open_stage: str | None = None
    began = last = datetime.now(UTC)

    def close(worked: float) -> None:
        if open_stage is not None:
            seconds[open_stage] = seconds.get(open_stage, 0.0) + worked

    for event in events:
        if event["kind"] in ("run_started", "stage_started"):
            close(max(0.0, (last - began).total_seconds()))
            open_stage = event.get("stage")
            began = datetime.fromisoformat(event["time"])
        elif event["kind"] == "stage_finished":
            close(0.0 if event["skipped"] else event["seconds"])
            open_stage = None
        last = datetime.fromisoformat(event["time"])
    return seconds


class EventTail(FileTail):
    """Reads the events that a diary gained since the last look, those of its rotated files (`events.jsonl.1` …) first;
    nothing is lost or told twice (see `tail`)."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, with_rotated=True)

    def poll(self) -> list[dict[str, Any]]:
        return [event for line in self.poll_lines() if (event := parse_event(line)) is not None]
