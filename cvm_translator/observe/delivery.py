"""Alerts on their way to webhooks and commands.

Guarantees: the monitor never waits for a target: each has a thread of its own, which sends alerts in their order and
tries one that was not taken again and again, backing off with jitter; one that its target refuses for good is set aside
and told of, so that it stands in nobody's way. What is owed to whom is written down in `monitor/deliveries.jsonl`
before the alert is told anywhere else, so the next monitor sends what this one could not, and nothing twice; only where
the process ends between the answer and the note of it is an alert sent again (its `key`, also in the header
Idempotency-Key, tells). Of two monitors at one run folder the first delivers. A disk that is full costs the notes, not
the alerts.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import random
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cvm_translator.observe.alerts import Alert
from cvm_translator.observe.targets import DeliveryError, Payload, Target
from cvm_translator.runs.text import printable

FIRST_DELAY_SECONDS = 1.0
MAX_DELAY_SECONDS = 300.0
MAX_WAITING = 1000
"""Alerts kept for a target that takes none; beyond them the oldest go."""
TELL_AFTER_ATTEMPTS = 3
PAYLOAD_VERSION = 1


def build_payload(alert: Alert, status: Mapping[str, Any]) -> dict[str, Any]:
    """What a target gets: plain JSON, every foreign character made visible; `text` is the line that chats show."""
    run_dir = printable(status["run_dir"])
    message = printable(alert.message)
    # Chats act upon <...> and @name; these are shown as they are instead.
    line = f"{alert.level} {run_dir}: {message}".replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return {
        "version": PAYLOAD_VERSION,
        "key": alert.key,
        "alert": alert.name,
        "level": alert.level,
        "message": message,
        "time": alert.time,
        "run_dir": run_dir,
        **{name: _plain(status.get(name)) for name in ("run_id", "state", "stage", "step")},
        "text": line.replace("@", "＠"),
    }


def _plain(value: Any) -> Any:
    return printable(value) if isinstance(value, str) else value


class Ledger:
    """What is owed to whom, in a file that outlives the monitor; one line for each alert that was queued or taken."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stream: Any = None
        self._guard = threading.Lock()
        self.owed: dict[tuple[str, str], Payload] = {}
        self.seen: set[tuple[str, str]] = set()

    def open(self) -> bool:
        """Read what was written and hold the file; False where another monitor holds it."""
        with contextlib.suppress(OSError):
            self.path.parent.mkdir(exist_ok=True)
            self._stream = open(self.path, "a+b", buffering=0)  # noqa: SIM115 (held as long as the monitor)
            try:
                fcntl.flock(self._stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self._stream.close()
                self._stream = None
                return False
            self._stream.seek(0)
            for line in self._stream.read().split(b"\n"):
                self._take_in(line)
        return True

    def _take_in(self, line: bytes) -> None:
        try:
            note = json.loads(line)
            place = (str(note["target"]), str(note["key"]))
        except (ValueError, TypeError, KeyError):
            return
        self.seen.add(place)
        if isinstance(note.get("payload"), dict):
            self.owed[place] = note["payload"]
        else:
            self.owed.pop(place, None)

    def note(self, target: str, key: str, **fields: Any) -> None:
        data = json.dumps({"time": _now(), "target": target, "key": key} | fields, ensure_ascii=True)
        with self._guard, contextlib.suppress(OSError):
            if self._stream is not None:
                self._stream.write(f"\n{data}\n".encode() if self._is_torn() else f"{data}\n".encode())

    def _is_torn(self) -> bool:
        size = os.fstat(self._stream.fileno()).st_size
        return size > 0 and os.pread(self._stream.fileno(), 1, size - 1) != b"\n"

    def close(self) -> None:
        with self._guard:
            if self._stream is not None:
                self._stream.close()
                self._stream = None


class Lane:
    """The alerts on their way to one target, and the thread that sends them."""

    def __init__(self, target: Target, ledger: Ledger) -> None:
        self.target, self.ledger = target, ledger
        self.waiting: deque[Payload] = deque(maxlen=MAX_WAITING)
        self.failure: str | None = None
        """Why the alert at the front was not taken, once that has been tried a few times."""
        self.refused: deque[tuple[str, str]] = deque(maxlen=MAX_WAITING)
        """Keys of alerts that the target will never take, and why."""
        self._changed = threading.Condition()
        self._deadline: float | None = None
        self._thread: threading.Thread | None = None

    def add(self, payloads: Sequence[Payload]) -> None:
        with self._changed:
            self.waiting.extend(payloads)
            self._changed.notify()
            if self._thread is None and self.waiting:
                self._thread = threading.Thread(target=self._work, name=f"alerts to {self.target.name}", daemon=True)
                self._thread.start()

    def _work(self) -> None:
        attempts = 0
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self.waiting or self._deadline is not None)
                if not self.waiting or (self._deadline is not None and time.monotonic() > self._deadline):
                    return
                payload = self.waiting[0]
            try:
                self.target.send(payload)
            except Exception as error:  # whatever a target does, the next attempt comes
                reason = str(error) if isinstance(error, DeliveryError) else type(error).__name__
                if isinstance(error, DeliveryError) and error.is_final:
                    attempts = 0
                    self.refused.append((str(payload["key"]), reason))
                    self._settle(payload, refused=reason)
                    continue
                attempts += 1
                asked = error.retry_after_seconds if isinstance(error, DeliveryError) else 0.0
                if not self._rest(attempts, asked, reason):
                    return
            else:
                attempts = 0
                self._settle(payload)

    def _settle(self, payload: Payload, **note: Any) -> None:
        """Go on to the next alert; this one is owed no longer."""
        self.failure = None
        self.ledger.note(self.target.name, str(payload["key"]), **note)
        with self._changed:
            if self.waiting and self.waiting[0] is payload:
                self.waiting.popleft()
            self._changed.notify_all()

    def _rest(self, attempts: int, asked_seconds: float, reason: str) -> bool:
        """Wait before the next attempt; False if there is none, since the monitor leaves."""
        delay = min(MAX_DELAY_SECONDS, FIRST_DELAY_SECONDS * 2.0 ** min(attempts - 1, 30)) * random.uniform(0.5, 1.0)
        until = time.monotonic() + max(delay, asked_seconds if asked_seconds > 0 else 0.0)
        if attempts >= TELL_AFTER_ATTEMPTS:
            self.failure = reason
        with self._changed:
            while (now := time.monotonic()) < until and (self._deadline is None or until < self._deadline):
                self._changed.wait(until - now)
            return self._deadline is None or until < self._deadline

    def close(self, deadline: float) -> int:
        """Let what is on its way arrive until `deadline` (monotonic); how many alerts are left."""
        with self._changed:
            self._deadline = deadline
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(max(0.0, deadline - time.monotonic()))
        return len(self.waiting)


class Deliveries:
    """All lanes of a monitor."""

    def __init__(self, path: Path, targets: Sequence[Target]) -> None:
        self.ledger = Ledger(path)
        self.lanes = [Lane(target, self.ledger) for target in targets]
        self.notice: str | None = None
        """What the user should be told once: another monitor delivers."""
        self._is_open = False

    def open(self) -> None:
        """Take up what an earlier monitor owed; nothing if there are no targets, or if already done."""
        if self._is_open or not self.lanes:
            return
        self._is_open = True
        if not self.ledger.open():
            self.notice = f"another monitor holds {self.ledger.path}: it sends the alerts, this one shows them"
            self.lanes = []
        for lane in self.lanes:
            owed = [payload for (name, _), payload in self.ledger.owed.items() if name == lane.target.name]
            lane.add(owed[-MAX_WAITING:])

    def queue(self, alerts: Sequence[Alert], status: Mapping[str, Any]) -> None:
        """Owe some alerts to every target; an alert that was owed before is not owed again."""
        for lane in self.lanes:
            new = []
            for alert in alerts:
                place = (lane.target.name, alert.key)
                if place not in self.ledger.seen:
                    self.ledger.seen.add(place)
                    new.append(build_payload(alert, status))
                    self.ledger.note(*place, payload=new[-1])
            lane.add(new)

    def find_failures(self) -> list[Alert]:
        """An alert an hour for each target that takes none, and one for each alert that was refused for good; for the
        log and the screen only."""
        now = _now()
        found: list[Alert] = []
        for lane in self.lanes:
            name, word = lane.target.name, lane.target.name.replace(" ", "_")
            if lane.failure is not None:
                message = f"{name} does not take alerts: {lane.failure}; left to send: {len(lane.waiting)}"
                found.append(Alert(f"not_delivered/{word}/{now[:13]}", "WARNING", message, now))
            for key, reason in list(lane.refused):
                message = f"{name} refused the alert {key}: {reason}; it is set aside"
                found.append(Alert(f"refused/{word}/{key}", "WARNING", message, now))
        return found

    def close(self, wait_seconds: float) -> list[str]:
        """Leave; a line for each target that is still owed something, or has refused something."""
        deadline = time.monotonic() + wait_seconds
        left = [(lane.target.name, lane.close(deadline)) for lane in self.lanes]
        self.ledger.close()
        lines = [f"{name} has not taken all alerts ({n} left): the next monitor sends them" for name, n in left if n]
        return lines + [
            f"{lane.target.name} has refused alerts ({len(lane.refused)}, the last since {lane.refused[-1][1]}): see"
            " monitor/deliveries.jsonl"
            for lane in self.lanes
            if lane.refused
        ]


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
