"""The run's diary: one JSON object a line, appended and never changed.

Guarantees: every event carries `schema_version`, `time` (UTC, ISO 8601), `kind`, `step` and `attempt`. Numbers are
written with all their digits, so the losses of a replayed step can be compared bit for bit; a number that JSON cannot
hold (NaN, infinity) is written as a string. A line torn by a crash or a full disk is closed off by the next write, and
readers pass over it; what a full disk refused is kept and written when there is room.

Per-step `train` events are buffered and written together with the next other event or at `flush`.
"""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

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
FULL_DISK = (errno.ENOSPC, errno.EDQUOT)


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
        self._stream = open(path, "ab", buffering=0)  # noqa: SIM115 (lives as long as the writer)
        self._is_torn = self._stream.tell() > 0 and not _ends_with_newline(path)
        self._buffer: list[bytes] = []
        self.listeners: list[Callable[[dict[str, Any]], None]] = []
        """Called with each event as it is made: the log, the progress display and TensorBoard hang on here."""

    def write(self, kind: str, *, step: int | None = None, attempt: int = 1, **fields: Any) -> None:
        """Append one event and everything buffered before it; where there is no room they wait for the next write."""
        self.buffer(kind, step=step, attempt=attempt, **fields)
        try:
            self.flush()
        except OSError as error:
            if error.errno not in FULL_DISK:
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
        line = json.dumps(event, ensure_ascii=False, allow_nan=False, default=str)
        self._buffer.append(line.encode("utf-8", "backslashreplace") + b"\n")
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
    """All whole events of a file, oldest first; a missing file has none."""
    if not path.exists():
        return
    with open(path, "rb") as stream:
        for line in stream:
            if line.endswith(b"\n") and (event := parse_event(line)) is not None:
                yield event


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


class EventTail:
    """Reads what a growing file gained since the last poll.

    The place is kept as (device, inode, offset), so a rotated or truncated file is read anew from its start, and the
    rest of a rotated one is read to its end first.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stream: Any = None
        self._identity: tuple[int, int] | None = None
        self._partial = b""

    def poll(self) -> list[dict[str, Any]]:
        return [event for line in self.poll_lines() if (event := parse_event(line)) is not None]

    def poll_lines(self) -> list[bytes]:
        """Whole new lines, without their ends."""
        lines: list[bytes] = []
        try:
            status = os.stat(self.path)
        except FileNotFoundError:
            status = None
        identity = (status.st_dev, status.st_ino) if status else None
        if self._stream is not None and identity != self._identity:
            lines += self._read()
            self._close()
        if self._stream is None:
            if identity is None:
                return lines
            try:
                self._stream = open(self.path, "rb")  # noqa: SIM115 (kept open between polls)
            except FileNotFoundError:
                return lines
            opened = os.fstat(self._stream.fileno())
            self._identity = (opened.st_dev, opened.st_ino)
        elif status is not None and status.st_size < self._stream.tell():
            self._stream.seek(0)
            self._partial = b""
        return lines + self._read()

    def _read(self) -> list[bytes]:
        data = self._partial + self._stream.read()
        *lines, self._partial = data.split(b"\n")
        return [line for line in lines if line]

    def _close(self) -> None:
        self._stream.close()
        self._stream, self._identity, self._partial = None, None, b""

    def close(self) -> None:
        if self._stream is not None:
            self._close()
