"""Three ways to show a run that is followed: a live view, plain lines, JSON lines.

Foreign text is made printable before it reaches a terminal.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from cvm_translator.observe.alerts import Alert, AlertBook
from cvm_translator.observe.describe import (
    describe_event,
    describe_losses,
    describe_speed,
    describe_step,
    format_status,
)
from cvm_translator.observe.history import Event
from cvm_translator.observe.machine import MachineWatch
from cvm_translator.observe.watch import RunWatch
from cvm_translator.runs.secrets import redact
from cvm_translator.runs.text import printable

PROGRESS_LINE_SECONDS = 60.0
END_STATES = ("done", "failed")


@dataclass(frozen=True)
class View:
    """What a screen may draw from."""

    watch: RunWatch
    book: AlertBook
    machine: MachineWatch


class Screen(Protocol):
    def show(self, view: View, status: dict[str, Any], events: Sequence[Event], alerts: Sequence[Alert]) -> None: ...

    def close(self) -> None: ...


class LiveScreen:
    """A view on a terminal that is drawn anew on every beat."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.live import Live

        self._live = Live(console=Console(), auto_refresh=False, transient=True, screen=False)
        self._live.start()

    def show(self, view: View, status: dict[str, Any], events: Sequence[Event], alerts: Sequence[Alert]) -> None:
        from cvm_translator.observe.live import build_view

        watch = view.watch
        drawn = build_view(
            status,
            watch.history,
            view.machine.figures,
            view.book.told,
            list(watch.log_lines),
            self._live.console.height,
        )
        self._live.update(drawn, refresh=True)

    def close(self) -> None:
        self._live.stop()


class LineScreen:
    """Plain lines for a pipe or a file: the state at first, then one line for every event of interest."""

    def __init__(self) -> None:
        self._state: str | None = None
        self._progress_at = 0.0

    def show(self, view: View, status: dict[str, Any], events: Sequence[Event], alerts: Sequence[Alert]) -> None:
        if self._state is None or status["state"] != self._state:
            if status["state"] == "never_started":
                print(f"waiting for a run in {printable(status['run_dir'])}", flush=True)
            elif status["state"] not in END_STATES:
                print(format_status(status), flush=True)
        self._state = status["state"]
        for event in events:
            if (text := describe_event(event)) is not None:
                print(f"{printable(event.get('time'))[:19]} {printable(text)}", flush=True)
        for alert in alerts:
            print(f"{alert.time[:19]} ALERT {alert.level}: {printable(alert.message)}", flush=True)
        if (
            status["state"] == "running"
            and status["step"] is not None
            and time.monotonic() - self._progress_at >= PROGRESS_LINE_SECONDS
        ):
            self._progress_at = time.monotonic()
            print(self._progress_line(status), flush=True)

    def _progress_line(self, status: dict[str, Any]) -> str:
        parts = [describe_step(status), describe_speed(status), describe_losses(status["losses"] or {})]
        return f"{printable(status['stage'] or 'starting')}: {'; '.join(part for part in parts if part)}"

    def close(self) -> None:
        sys.stdout.flush()


class JsonScreen:
    """One status object a line, whenever the run has moved; alerts under `alerts`."""

    def __init__(self) -> None:
        self._last: tuple[Any, ...] | None = None

    def show(self, view: View, status: dict[str, Any], events: Sequence[Event], alerts: Sequence[Alert]) -> None:
        mark = (status["state"], status["stage"], status["step"], status["attempt"], view.watch.history.num_events)
        if mark != self._last or alerts:
            told = [{"key": alert.key, "level": alert.level, "message": alert.message} for alert in alerts]
            print(redact(json.dumps(status | {"alerts": told}, ensure_ascii=True)), flush=True)
        self._last = mark

    def close(self) -> None:
        sys.stdout.flush()
