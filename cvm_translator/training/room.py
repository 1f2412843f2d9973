"""A full disk pauses a loop instead of ending it.

Guarantees: what could not be written is written when there is room again, and the loop goes on from where it stood, bit
for bit. While it waits, signals are obeyed (it then leaves with the last checkpoint that was saved) and the heartbeat
goes on. Room that is missing before the first step is an error as any other: nothing would be lost by it.
"""

from __future__ import annotations

import contextlib
import copy
import os
import sys
import time
from collections.abc import Callable
from typing import TypeVar

from cvm_translator.errors import CheckpointError, Stopped, is_full_disk
from cvm_translator.runs.text import printable
from cvm_translator.training.setup import LoopSetup
from cvm_translator.training.state import LoopState, capture_random_state, restore_random_state

LOOK_EVERY_SECONDS = 1.0
RETRY_AFTER_SECONDS = 30.0
"""Tried again after so long even if no more room is seen: a quota shows in no figure."""

Result = TypeVar("Result")


def with_room(
    setup: LoopSetup, state: LoopState, work: Callable[[], Result], undo: Callable[[], object] | None = None
) -> Result:
    """Do `work`, as often as the disk is too full for it; `undo` takes back what a failed attempt has changed.

    Raises Stopped when the run was asked to leave while it waited.
    """
    is_waiting = False
    while True:
        try:
            result = work()
        except (OSError, CheckpointError) as error:
            if state.executed_steps == 0 or not is_full_disk(error):
                raise
            if not is_waiting:
                is_waiting = True
                _tell(setup, state, error)
        else:
            if is_waiting:
                setup.tell(state, "continued")
            return result
        _wait(setup)
        setup.heartbeat.beat("save")
        if undo is not None:
            undo()


def judge_with_room(setup: LoopSetup, state: LoopState, work: Callable[[], Result]) -> Result:
    """What `work` has the judge do; where its files found no room it is done again, as if for the first time.

    Raises Stopped when the run was asked to leave meanwhile; nothing is then remembered of the attempt.
    """
    before, random = copy.deepcopy(setup.judge.state_dict()), capture_random_state()

    def undo() -> None:
        setup.judge.load_state_dict(before)
        restore_random_state(random)

    try:
        return with_room(setup, state, work, undo)
    except Stopped:
        undo()
        raise


def _tell(setup: LoopSetup, state: LoopState, error: Exception) -> None:
    message = f"the run pauses until there is room: {error}"
    setup.tell(state, "warning", code="disk_full", message=message)
    setup.tell(state, "paused", reason="the disk is full")
    if setup.events.is_behind:  # no room for this line either: say it where the output goes
        with contextlib.suppress(OSError):
            print(f"warning: {printable(message)}", file=sys.stderr, flush=True)


def _wait(setup: LoopSetup) -> None:
    """Return when there is more room than now, or after a while."""
    free, deadline = _free_bytes(setup), time.monotonic() + RETRY_AFTER_SECONDS
    while _free_bytes(setup) <= free and time.monotonic() < deadline:
        setup.heartbeat.beat("waiting")
        if setup.stop.signal_number is not None:
            raise Stopped(setup.stop.signal_number, is_saved=False)
        time.sleep(LOOK_EVERY_SECONDS)


def _free_bytes(setup: LoopSetup) -> int:
    disk = os.statvfs(setup.store.directory)
    return disk.f_bavail * disk.f_frsize
