"""Requests to a run: `control.json`, written by any observer, obeyed by the trainer at a step's end.

    {"schema_version": 1, "requests": [{"id": "a1b2…", "action": "pause", "time": "2026-…"}]}

Guarantees
- Writers take turns (an advisory lock on `.control.lock`), add to the list and replace the file in one rename, so none
  loses another's request; the newest 50 are kept.
- A request is obeyed once: each is answered by a `control` event with its id, and ids that were answered, in this start
  of the run or an earlier one, are passed over.
- What was asked before a start that somebody asked for is stale: answered, not obeyed. A start by the supervisor after
  a crash still obeys what the trainer before it had not answered.
- Looking costs next to nothing: a clock reading a step, and at most four times a second a `stat`.
- A file that is torn, too large, not a plain file or not what is written above is told of once and otherwise passed
  over; so is a single request in it. It never ends a run.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import stat
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cvm_translator.runs import atomic
from cvm_translator.runs.events import read_events

ACTIONS = ("pause", "continue", "checkpoint", "validate", "stop")
SCHEMA_VERSION = 1
MAX_FILE_BYTES = 64 << 10
NUM_KEPT = 50
LOOK_EVERY_SECONDS = 0.25
_ID = re.compile(r"[A-Za-z0-9._-]{1,64}\Z")


@dataclass(frozen=True)
class Request:
    """One request; the action may be one that nobody knows."""

    id: str
    action: str


def submit(path: Path, action: str) -> str:
    """Add a request to a run's control file; returns its id."""
    identity = uuid.uuid4().hex[:12]
    with open(path.parent / ".control.lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            requests, _ = _read_entries(path)
        except (OSError, ValueError):
            requests = []  # nobody can obey what is in there
        requests.append({"id": identity, "action": action, "time": datetime.now(UTC).isoformat(timespec="seconds")})
        atomic.write_json(path, {"schema_version": SCHEMA_VERSION, "requests": requests[-NUM_KEPT:]})
    return identity


def _read_entries(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The well-formed requests of a file, and how many others there are; a missing file has none.

    Raises OSError or ValueError where the file itself cannot be used.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return [], 0
    with open(descriptor, "rb") as stream:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise ValueError("it is not a plain file")
        data = stream.read(MAX_FILE_BYTES + 1)
    if len(data) > MAX_FILE_BYTES:
        raise ValueError(f"it is larger than {MAX_FILE_BYTES:,} bytes")
    try:
        plain = json.loads(data)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    requests = plain.get("requests") if isinstance(plain, dict) else None
    if not isinstance(requests, list):
        raise ValueError("it holds no list of requests")
    found = [entry for entry in requests if _is_request(entry)]
    return found, len(requests) - len(found)


def _is_request(entry: Any) -> bool:
    if not isinstance(entry, dict):
        return False
    identity, action = entry.get("id"), entry.get("action")
    is_proper = isinstance(identity, str) and _ID.match(identity) is not None
    return is_proper and isinstance(action, str) and len(action) <= 64


class ControlFile:
    """The trainer's side: what is asked for and not answered yet."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen: tuple[int, ...] | None = None
        self._next_look = 0.0
        self._answered: set[str] = set()
        self._waiting: list[Request] = []
        self.problem: str | None = None
        """Why the file as it is now cannot be used, until the next call of `take_problem`."""

    def begin(self, events: Path, *, is_restart: bool) -> list[Request]:
        """Take over from earlier starts of the run; returns the stale requests, to be answered as such."""
        self._look()
        if not self._waiting:
            return []
        answered = {event.get("id") for event in read_events(events) if event["kind"] == "control"}
        self._answered |= {request.id for request in self._waiting if request.id in answered}
        self._waiting = [request for request in self._waiting if request.id not in self._answered]
        if is_restart:
            return []
        stale, self._waiting = self._waiting, []
        self._answered |= {request.id for request in stale}
        return stale

    def poll(self) -> Iterator[Request]:
        """Requests in the order of the file; each is given once."""
        now = time.monotonic()
        if now >= self._next_look:
            self._next_look = now + LOOK_EVERY_SECONDS
            self._look()
        while self._waiting:
            request = self._waiting.pop(0)
            self._answered.add(request.id)
            yield request

    def take_problem(self) -> str | None:
        problem, self.problem = self.problem, None
        return problem

    def _look(self) -> None:
        """Read the file if it is another one than at the last look."""
        try:
            status = os.stat(self._path, follow_symlinks=False)
            seen = (status.st_mtime_ns, status.st_ino, status.st_size)
        except OSError:
            self._seen = None
            return
        if seen == self._seen:
            return
        self._seen = seen
        try:
            entries, num_bad = _read_entries(self._path)
        except (OSError, ValueError) as error:
            self.problem = f"{self._path} is passed over: {' '.join(str(error).split())[:200]}"
            return
        if num_bad:
            self.problem = f"{self._path}: {num_bad} requests without a proper id and action are passed over"
        known = self._answered | {request.id for request in self._waiting}
        for entry in entries:
            if entry["id"] not in known:
                known.add(entry["id"])
                self._waiting.append(Request(entry["id"], entry["action"]))
