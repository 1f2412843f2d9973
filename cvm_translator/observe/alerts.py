"""What somebody should be told, once: degradation, rollback, halt, stall, death, restart, disk, gate, the end.

Guarantees: every alert has a key made from what happened: the run with the stage, attempt and step, or the number of
the rollback, so that what a crash lets happen again is not told again; the moment only where each time is news (a
failure, a restart, the end of a supervisor). A key is told once, also by a monitor that is started again: the keys in
`monitor/alerts.log` are read back. The log holds one line an alert, `time LEVEL key: message`, with foreign characters
escaped and secrets left out; where it cannot be written (a full disk), alerts are shown all the same.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cvm_translator.observe.describe import describe_event
from cvm_translator.observe.history import RESTART_CODE, Event
from cvm_translator.runs.heartbeat import SUPERVISOR_GONE
from cvm_translator.runs.text import printable


@dataclass(frozen=True)
class Alert:
    key: str
    """`name/occurrence`, without blanks."""
    level: str
    """INFO, WARNING or CRITICAL."""
    message: str
    time: str

    @property
    def name(self) -> str:
        return self.key.split("/")[0]

    def line(self) -> str:
        return f"{self.time} {self.level} {self.key}: {printable(self.message)}"


def _build_key(name: str, *occurrence: Any) -> str:
    """The name and what of the occurrence is known."""
    return "/".join([name, *(_word(part) for part in occurrence if part not in (None, ""))])


def _word(text: Any) -> str:
    return printable(text).replace(" ", "_")[:200]


def alerts_of_event(event: Event, *, run_id: Any = None, is_restart: bool = False) -> list[Alert]:
    """What an event of a run calls for; `is_restart` says that the process before this run_started had gone without a
    word."""
    message, time = describe_event(event) or "", _word(event.get("time"))
    return [
        Alert(_build_key(name, run_id, *occurrence), level, message, time)
        for name, level, occurrence in _find_in_event(event, is_restart)
    ]


def _find_in_event(event: Event, is_restart: bool) -> list[tuple[str, str, tuple[Any, ...]]]:
    """Name, level and occurrence within the run, of each alert."""
    kind, code, verdict = event["kind"], event.get("code"), event.get("verdict")
    moment, stage = (event.get("time"),), event.get("stage") or "distil"
    place = (stage, event.get("attempt"), event.get("step"))
    is_told_restart = kind == "warning" and code == RESTART_CODE
    found: list[tuple[bool, str, str, tuple[Any, ...]]] = [
        (is_told_restart or (kind == "run_started" and is_restart), "restart", "WARNING", moment),
        (kind == "warning" and code == "disk_full", "disk_full", "CRITICAL", place),
        (kind == "verdict" and verdict in ("warning", "degraded", "emergency"), "degradation", "WARNING", place),
        (kind == "verdict" and event.get("action") == "halt", "halted", "CRITICAL", (stage,)),
        (kind == "rollback", "rollback", "WARNING", (stage, event.get("rollback_number"))),
        (kind == "resumed" and event.get("exact") is False, "inexact_resume", "WARNING", place),
        (kind == "stopped" and event.get("reason") == SUPERVISOR_GONE, "supervisor_gone", "CRITICAL", moment),
        (kind == "failed", "failed", "CRITICAL", moment),
        (kind == "run_finished" and bool(event.get("halted")), "halted", "CRITICAL", (stage,)),
        (kind == "run_finished" and event.get("gate_passed") is False, "gate_failed", "CRITICAL", ()),
        (kind == "run_finished", "finished", "INFO", ()),
    ]
    return [(name, level, occurrence) for is_there, name, level, occurrence in found if is_there]


LEVELS = {"dead_process": "CRITICAL", "supervisor_gone": "CRITICAL"}
"""Of the notes in a status's health that are more than a warning."""


def alerts_of_status(status: Mapping[str, Any], low_since: str = "") -> list[Alert]:
    """Dead process, stalled step, low disk: what no event tells. `low_since`: see `LowDisk`."""
    now = _now()
    occurrences: dict[str, tuple[Any, ...]] = {
        "dead_process": (status["started_at"], status["pid"], status["step"]),
        "stalled_step": (status["started_at"], status["stage"], status["attempt"], status["step"]),
        "supervisor_gone": (status["run_id"], (status["result"] or {}).get("time")),
        "low_disk": (low_since or now,),
    }
    return [
        Alert(
            key=_build_key(note["code"], *occurrences.get(note["code"], (now,))),
            level=LEVELS.get(note["code"], "WARNING"),
            message=note["message"],
            time=now,
        )
        for note in status["health"]
    ]


class AlertBook:
    """Keeps which alerts have been told, in a log that outlives the monitor."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.told: list[Alert] = []
        self.keys: dict[str, None] = {}
        """Of all alerts that were told, oldest first."""
        if path.exists():
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
            self.keys = {line.split(" ")[2].removesuffix(":"): None for line in lines if line.count(" ") >= 3}

    def find_new(self, alerts: Iterable[Alert]) -> list[Alert]:
        """Those that have not been told."""
        return list({alert.key: alert for alert in alerts if alert.key not in self.keys}.values())

    def tell(self, alerts: Iterable[Alert]) -> list[Alert]:
        """The alerts that are new, now written to the log."""
        new = self.find_new(alerts)
        self.keys |= {alert.key: None for alert in new}
        if new and self.path.parent.parent.is_dir():
            with contextlib.suppress(OSError):
                self.path.parent.mkdir(exist_ok=True)
                with open(self.path, "a", encoding="utf-8") as stream:
                    stream.writelines(alert.line() + "\n" for alert in new)
        self.told += new
        return new


class LowDisk:
    """Since when the disk has been low, so that it is told once each time it becomes so.

    It is over when there is half as much again as is advised: a disk on the brink becomes low once. One that was low
    when the monitor before this one looked last, and is now, has been low all the time.
    """

    OVER_FACTOR = 1.5

    def __init__(self, book: AlertBook) -> None:
        told = [key for key in book.keys if key.startswith("low_disk/")]
        self._since = told[-1].removeprefix("low_disk/") if told else ""

    def look(self, status: Mapping[str, Any]) -> str:
        """When it became low, or nothing if it is not."""
        free = status["disk_free_bytes"]
        if free is not None and free >= self.OVER_FACTOR * status["disk_advised_bytes"]:
            self._since = ""
        elif not self._since and any(note["code"] == "low_disk" for note in status["health"]):
            self._since = _now()
        return self._since


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
