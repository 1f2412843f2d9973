"""The heartbeat of a supervised trainer: a line on an inherited pipe for each piece of work that was done.

Guarantees: a beat is given by the thread that works, never by a thread of its own, so it means progress; it carries
phase, stage, step and attempt. Beating never blocks and never fails the run: a beat that finds the pipe full is
dropped. When the supervisor has died the next beat finds the pipe without a reader and calls `on_gone`; on Linux the
kernel sends SIGHUP at once. Where nobody supervises, a beat does nothing.
"""

from __future__ import annotations

import contextlib
import os
import signal
import stat
import sys
from collections.abc import Callable
from dataclasses import dataclass

ENVIRONMENT = "CVM_TRANSLATOR_SUPERVISOR"
"""Set by the supervisor for its trainer: the pipe's descriptor and how often the trainer was restarted, as `7:0`."""

PHASES = ("begun", "stage", "step", "validation", "save", "paused", "waiting")
"""What a beat says is being done from now on. begun: the lock is held and `run_started` is written; paused: as somebody
asked; waiting: for room on the disk."""

SUPERVISOR_GONE = "the supervisor is gone"
"""Why a trainer left whose supervisor has died: the `reason` of its `stopped` event."""

_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Beat:
    """What the trainer was about to do when it gave a sign."""

    phase: str
    stage: str | None
    step: int
    attempt: int

    def line(self) -> bytes:
        return f"{self.phase} {self.stage or '-'} {self.step} {self.attempt}\n".encode()


def parse_beat(line: bytes) -> Beat | None:
    """The beat of a line, or None for one that is torn."""
    words = line.decode("utf-8", "replace").split()
    if len(words) != 4 or words[0] not in PHASES or not (words[2].isdigit() and words[3].isdigit()):
        return None
    return Beat(words[0], None if words[1] == "-" else words[1], int(words[2]), int(words[3]))


class Heartbeat:
    """The trainer's end of the pipe."""

    def __init__(self, descriptor: int | None = None, num_restarts: int = 0) -> None:
        self._descriptor = descriptor
        self._last = Beat("begun", None, 0, 1)
        self.num_restarts = num_restarts
        """How often the supervisor has started this run again; 0 for a start that somebody asked for."""
        self.on_gone: Callable[[], object] = lambda: None

    @classmethod
    def from_environment(cls) -> Heartbeat:
        """The pipe that a supervisor named, if one did; it leaves the environment, so no child of ours beats it."""
        given = os.environ.pop(ENVIRONMENT, "")
        try:
            descriptor, num_restarts = (int(part) for part in given.split(":"))
            if not stat.S_ISFIFO(os.fstat(descriptor).st_mode):
                return cls()
        except (ValueError, OSError):
            return cls()
        os.set_inheritable(descriptor, False)
        os.set_blocking(descriptor, False)
        if sys.platform == "linux":
            import ctypes  # by a supervised trainer alone: `status` has no use for it

            with contextlib.suppress(OSError, AttributeError):
                ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGHUP)
        return cls(descriptor, num_restarts)

    @property
    def is_supervised(self) -> bool:
        return self._descriptor is not None

    def beat(
        self, phase: str, *, stage: str | None = None, step: int | None = None, attempt: int | None = None
    ) -> None:
        """Say what is being done; stage, step and attempt stay what they were where they are not given."""
        if self._descriptor is None:
            return
        last = self._last
        self._last = Beat(
            phase,
            last.stage if stage is None else stage,
            last.step if step is None else step,
            last.attempt if attempt is None else attempt,
        )
        try:
            os.write(self._descriptor, self._last.line())
        except BlockingIOError:
            pass
        except OSError:
            self._descriptor = None
            self.on_gone()


def is_supervised() -> bool:
    """Whether this process was begun by a supervisor and has not opened its heartbeat yet."""
    return ENVIRONMENT in os.environ
