"""Asking a run for something through its control file, and waiting for the answer in its events."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from cvm_translator.daemon.background import NotRunningError, find_keeper
from cvm_translator.errors import CvmError
from cvm_translator.runs.control import submit
from cvm_translator.runs.events import EventTail
from cvm_translator.runs.layout import RunLayout

ANSWER_TIMEOUT_SECONDS = 60.0
_POLL_SECONDS = 0.05


def ask(run_dir: Path, action: str, timeout_seconds: float = ANSWER_TIMEOUT_SECONDS) -> str:
    """File a request; returns what the run answered.

    Raises NotRunningError when nobody holds the folder, CvmError when the run refuses, ends, or does not answer in
    time; a request that was not answered in time stays, and is obeyed at the next step's end.
    """
    layout = RunLayout(run_dir)
    if find_keeper(layout) is None:
        raise NotRunningError(f"no run holds {run_dir}: there is nobody to ask")
    tail = EventTail(layout.events)
    try:
        tail.poll()
        identity = submit(layout.control, action)
        deadline = time.monotonic() + timeout_seconds
        while time.monotonic() < deadline:
            is_over = find_keeper(layout) is None  # asked before the events are read: the last may be the answer
            for event in tail.poll():
                if event["kind"] == "control" and event.get("id") == identity:
                    return _read_answer(event)
            if is_over:
                raise CvmError(f"{run_dir}: the run ended before it could {action}")
            time.sleep(_POLL_SECONDS)
    finally:
        tail.close()
    raise CvmError(
        f"{run_dir}: no answer to {action} (request {identity}) within {timeout_seconds:.0f} s; it stays asked for, and"
        " is obeyed at the end of the next training step"
    )


def _read_answer(event: dict[str, Any]) -> str:
    message = str(event.get("message"))
    if event.get("result") != "done":
        raise CvmError(f"request {event.get('id')} ({event.get('action')}) is {event.get('result')}: {message}")
    return message
