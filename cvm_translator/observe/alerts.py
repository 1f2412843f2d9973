"""What somebody should be told, once: degradation, rollback, halt, stall, death, restart, low disk, gate, the end.

Guarantees: every alert has a key made from what happened (the event's time, the process, the step), and a key is told
once, also by a monitor that is started again: the keys in `monitor/alerts.log` are read back. The log holds one line
an alert, `time LEVEL key: message`, with foreign characters escaped and secrets left out; where it cannot be written
(a full disk), alerts are shown all the same.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cvm_translator.observe.describe import describe_event
from cvm_translator.observe.history import Event
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


WARNING_ALERTS = {
    "restart": ("restart", "WARNING"),
    "disk_full": ("low_disk", "CRITICAL"),
}
"""Alerts that a run raises itself, by the code of its `warning` event."""


def alerts_of_event(event: Event, *, is_restart: bool = False) -> list[Alert]:
    """What an event calls for; `is_restart` says that the process before this run_started had gone without a word."""
    kind, found = event["kind"], []
    if kind == "run_started" and is_restart:
        found.append(("restart", "WARNING"))
    if kind == "warning" and str(event.get("code")) in WARNING_ALERTS:
        found.append(WARNING_ALERTS[str(event["code"])])
    if kind == "verdict" and event.get("verdict") in ("warning", "degraded", "emergency"):
        found.append(("degradation", "WARNING"))
    if kind == "verdict" and event.get("action") == "halt":
        found.append(("halted", "CRITICAL"))
    if kind == "rollback":
        found.append(("rollback", "WARNING"))
    if kind == "resumed" and event.get("exact") is False:
        found.append(("inexact_resume", "WARNING"))
    if kind == "failed":
        found.append(("failed", "CRITICAL"))
    if kind == "run_finished":
        if event.get("halted"):
            found.append(("halted", "CRITICAL"))
        if event.get("gate_passed") is False:
            found.append(("gate_failed", "CRITICAL"))
        found.append(("finished", "INFO"))
    message, time = describe_event(event) or "", str(event.get("time"))
    mark = printable(time).replace(" ", "_")
    return [Alert(f"{name}/{mark}", level, message, mark) for name, level in found]


def alerts_of_status(status: Mapping[str, Any]) -> list[Alert]:
    """Dead process, stalled step, low disk: what no event tells."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    occurrences = {
        "dead_process": f"{status['started_at']}/{status['pid']}/{status['step']}",
        "stalled_step": f"{status['started_at']}/{status['stage']}/{status['attempt']}/{status['step']}",
        "low_disk": now[:10],  # at most once a day
    }
    levels = {"dead_process": "CRITICAL"}
    return [
        Alert(
            key=f"{note['code']}/{printable(occurrences.get(note['code'], now)).replace(' ', '_')}",
            level=levels.get(note["code"], "WARNING"),
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
        self._keys: set[str] = set()
        if path.exists():
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
            self._keys = {line.split(" ")[2].rstrip(":") for line in lines if line.count(" ") >= 3}

    def find_new(self, alerts: Iterable[Alert]) -> list[Alert]:
        """Those that have not been told."""
        return list({alert.key: alert for alert in alerts if alert.key not in self._keys}.values())

    def tell(self, alerts: Iterable[Alert]) -> list[Alert]:
        """The alerts that are new, now written to the log."""
        new = self.find_new(alerts)
        self._keys |= {alert.key for alert in new}
        if new and self.path.parent.parent.is_dir():
            with contextlib.suppress(OSError):
                self.path.parent.mkdir(exist_ok=True)
                with open(self.path, "a", encoding="utf-8") as stream:
                    stream.writelines(alert.line() + "\n" for alert in new)
        self.told += new
        return new
