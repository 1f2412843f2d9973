"""A small process without torch that keeps a run going: it starts the trainer, restarts it, and ends when the run has.

Guarantees
- A trainer that crashes is started again and goes on from its newest valid checkpoint: at most five times within an
  hour, after 1, 2, 4, 8 and 16 seconds by a monotonic clock; then the run has failed, with the reason, exit code 1.
- What a restart cannot mend ends the supervision with the trainer's own exit code: 0 and 5 (done), 1 (an error that
  the user must mend), 2 (wrong usage), 130 and 143 (it was asked to stop and has saved). A supervised trainer ends with
  EXIT_CRASHED for an exception that nobody foresaw and with EXIT_OUT_OF_MEMORY or EXIT_NO_ROOM for want of memory or of
  room on the disk, so that 1 is always an error told to the user. A trainer that ends before its run has begun for the
  first time is not started again either.
- One that finds no room on the disk, once a step has been taken, is started again when there is room, after however
  long. Before the first step the run has failed.
- A trainer that hangs (see `pulse`) gets SIGTERM, after 30 seconds SIGKILL, and is started again.
- One that ran out of memory in a training step is started again with twice as many micro-batches (see `memory`).
- A run that was paused when its trainer crashed is paused again.
- SIGTERM and SIGINT are passed on, each as often as it came; after one of them nothing is started again.
- The trainer holds the run's lock. The supervisor holds `supervisor.lock`, and takes the run's own only for the moment
  in which it adds a line to the events of a run whose trainer is dead.
- If the supervisor dies, the trainer saves and leaves (see `runs.heartbeat`).
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cvm_translator.daemon.inbox import STOP_SIGNALS, Inbox
from cvm_translator.daemon.memory import count_oom_kills, halve_micro_batches, has_grown
from cvm_translator.daemon.notify import VARIABLES, Notifier
from cvm_translator.daemon.pulse import Patience, Pulse
from cvm_translator.errors import (
    EXIT_CRASHED,
    EXIT_ERROR,
    EXIT_GATE_FAILED,
    EXIT_NO_ROOM,
    EXIT_OK,
    EXIT_OUT_OF_MEMORY,
    EXIT_USAGE,
    CvmError,
    RunFolderError,
)
from cvm_translator.runs.control import submit
from cvm_translator.runs.events import EventWriter
from cvm_translator.runs.heartbeat import ENVIRONMENT, Beat
from cvm_translator.runs.layout import RunLayout
from cvm_translator.runs.lock import RunLock
from cvm_translator.runs.text import printable

FINAL_CODES = (EXIT_OK, EXIT_ERROR, EXIT_USAGE, EXIT_GATE_FAILED, *(128 + number for number in STOP_SIGNALS))
ROOM_BYTES = 1 << 20
"""So much more room on the disk is worth a try."""


@dataclass(frozen=True)
class Rules:
    """How patient the supervisor is."""

    max_restarts: int = 5
    window_seconds: float = 3600.0
    first_delay_seconds: float = 1.0
    """Before the first restart; doubled for each further one within the window."""
    grace_seconds: float = 30.0
    """Between the SIGTERM and the SIGKILL of a hung trainer."""
    room_seconds: float = 60.0
    """Before a trainer that found no room is started again even if there is no more of it."""
    tick_seconds: float = 1.0
    patience: Patience = field(default_factory=Patience)


@dataclass(frozen=True)
class Ending:
    """How a trainer ended."""

    code: int
    """Its exit code, or minus the signal that killed it."""
    has_begun: bool
    has_stepped: bool
    last_beat: Beat | None
    where: str
    hung_seconds: float | None
    """How long it had been silent, if it was ended for that."""
    is_out_of_memory: bool


class Supervisor:
    """Keeps one run going; `run` returns the exit code. To be used in the main thread of a process.

    `first` begins the run, `again` carries it on after a crash.
    """

    def __init__(
        self,
        layout: RunLayout,
        first: Sequence[str],
        again: Sequence[str],
        *,
        rules: Rules | None = None,
        notifier: Notifier | None = None,
        count_kills: Callable[[], dict[str, int]] = count_oom_kills,
    ) -> None:
        self._layout = layout
        self._first, self._again = list(first), list(again)
        self._rules = rules or Rules()
        self._notifier = notifier or Notifier()
        self._count_kills = count_kills
        self._inbox = Inbox()
        self._restarts: deque[float] = deque()
        """Moments of the restarts within the window."""
        self._num_restarts = 0
        self._has_begun = self._has_stepped = False
        self._is_without_room = False
        """Whether the last trainer ended for want of room."""

    def run(self) -> int:
        """Supervise to the end. Raises RunFolderError when somebody else supervises this folder."""
        with RunLock(self._layout.supervisor_lock), self._inbox:
            try:
                return self._keep_going()
            finally:
                self._notifier.send("STOPPING=1")

    def _keep_going(self) -> int:
        command = self._first
        while True:
            ending = self._run_trainer(command)
            self._has_begun |= ending.has_begun
            self._has_stepped |= ending.has_stepped
            reason = self._find_reason(ending)
            if reason is None:
                return self._finish(ending)
            # ---------------------------------------------------------------------------------- once more, or give up?
            if ending.code == EXIT_NO_ROOM:
                is_stopped = self._wait_for_room(ending, reason)
            elif self._count_restarts() < self._rules.max_restarts:
                is_stopped = self._wait_for_restart(ending, reason)
            else:
                message = f"given up after {len(self._restarts)} restarts within an hour; at last {reason}"
                self._tell("failed", ending.last_beat, message=message)
                _print(f"error: {message}")
                return EXIT_ERROR
            if is_stopped:
                self._tell("stopped", ending.last_beat, signal=self._inbox.stops[0])
                return 128 + self._inbox.stops[0]
            self._is_without_room = ending.code == EXIT_NO_ROOM
            self._num_restarts += 1
            command = self._again

    # ----------------------------------------------------------------------------------------------------- the trainer

    def _run_trainer(self, command: Sequence[str]) -> Ending:
        """Start the trainer and watch it until it has ended."""
        kills_before = self._count_kills()
        read, write = os.pipe()
        try:
            os.set_blocking(read, False)
            environment = {name: value for name, value in os.environ.items() if name not in VARIABLES}
            environment[ENVIRONMENT] = f"{write}:{self._num_restarts}"
            # A session of its own: what a terminal sends to its foreground group must not reach the trainer twice.
            trainer = subprocess.Popen(
                command, env=environment, pass_fds=(write,), stdin=subprocess.DEVNULL, start_new_session=True
            )
            os.close(write)
            pulse = Pulse(read, self._rules.patience, self._rules.tick_seconds)
            try:
                hung_seconds = self._watch(trainer, pulse)
            finally:
                # What the trainer itself had started dies with it; before it is reaped its group is certainly its own.
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(trainer.pid, signal.SIGKILL)
            code = trainer.wait()
        finally:
            os.close(read)
        is_killed_for_memory = code == -signal.SIGKILL and has_grown(kills_before, self._count_kills())
        return Ending(
            code=code,
            has_begun=pulse.has_begun,
            has_stepped=pulse.has_stepped,
            last_beat=pulse.beat,
            where=pulse.describe(),
            hung_seconds=hung_seconds,
            is_out_of_memory=code == EXIT_OUT_OF_MEMORY or (is_killed_for_memory and hung_seconds is None),
        )

    def _watch(self, trainer: subprocess.Popen[Any], pulse: Pulse) -> float | None:
        """Return when the trainer has ended: how long it had hung, if it was ended for that.

        It is not reaped yet and signalled by its id alone, so no signal can meet another process.
        """
        num_forwarded, is_ready, hung_seconds = 0, False, None
        kill_at = float("inf")
        while not _has_ended(trainer.pid):
            self._inbox.wait(self._rules.tick_seconds, pulse.descriptor)
            pulse.read()
            for number in self._inbox.stops[num_forwarded:]:
                self._notifier.send("STOPPING=1", "STATUS=saving and leaving")
                os.kill(trainer.pid, number)
                num_forwarded += 1
            if pulse.has_begun and not is_ready:
                is_ready = True
                self._notifier.send("READY=1", f"STATUS={pulse.describe()}")
            if pulse.is_hung():
                if hung_seconds is None:
                    hung_seconds = pulse.silence_seconds
                    kill_at = time.monotonic() + self._rules.grace_seconds
                    _print(f"no sign of the trainer for {hung_seconds:.0f} s {pulse.describe()}: it is ended")
                    os.kill(trainer.pid, signal.SIGTERM)
                elif time.monotonic() > kill_at:
                    os.kill(trainer.pid, signal.SIGKILL)
            else:
                self._notifier.status(pulse.describe())
                self._notifier.ping()
        pulse.read()
        return hung_seconds

    # ---------------------------------------------------------------------------------------------------- what follows

    def _find_reason(self, ending: Ending) -> str | None:
        """Why the trainer is to be started again, or None where it is not."""
        if self._inbox.stops:
            return None
        if ending.hung_seconds is not None:
            return f"no sign of progress for {ending.hung_seconds:.0f} s {ending.where}: the trainer hung"
        if ending.code == EXIT_NO_ROOM:
            return f"the trainer found no room on the disk {ending.where}" if self._has_stepped else None
        if not self._has_begun or ending.code in FINAL_CODES or -ending.code in STOP_SIGNALS:
            return None
        if ending.is_out_of_memory:
            return f"the trainer ran out of memory {ending.where}"
        if ending.code < 0:
            return f"the trainer was killed by signal {-ending.code} {ending.where}"
        return f"the trainer crashed {ending.where} (exit code {ending.code})"

    def _count_restarts(self) -> int:
        """Those within the window that ends now."""
        now = time.monotonic()
        while self._restarts and now - self._restarts[0] > self._rules.window_seconds:
            self._restarts.popleft()
        return len(self._restarts)

    def _wait_for_restart(self, ending: Ending, reason: str) -> bool:
        """Announce a restart and wait before it; whether a stop was asked for meanwhile."""
        delay = self._rules.first_delay_seconds * 2 ** len(self._restarts)
        self._announce(ending, reason, delay)
        if self._inbox.wait_for_stop(delay):
            return True
        self._restarts.append(time.monotonic())
        return False

    def _wait_for_room(self, ending: Ending, reason: str) -> bool:
        """Wait until the disk has more room than now, or for a while, since a quota shows in no figure; whether a stop
        was asked for meanwhile. It is told when the waiting begins, and counts as no restart."""
        if not self._is_without_room or ending.has_begun:
            message = f"{reason}; it is started again when there is room"
            _print(message)
            self._tell("warning", ending.last_beat, code="disk_full", message=message)
        self._notifier.send("STATUS=waiting for room on the disk")
        free, deadline = _free_bytes(self._layout.root), time.monotonic() + self._rules.room_seconds
        while not self._inbox.wait_for_stop(self._rules.tick_seconds):
            self._notifier.ping()
            if _free_bytes(self._layout.root) >= free + ROOM_BYTES or time.monotonic() > deadline:
                return False
        return True

    def _announce(self, ending: Ending, reason: str, delay: float) -> None:
        """Tell that, and how, the trainer is started again."""
        change = None
        if ending.is_out_of_memory:
            try:
                change = halve_micro_batches(self._layout, ending.last_beat)
            except (CvmError, OSError) as error:
                change = f"micro-batches stay as they are: {error}"
        if ending.last_beat and ending.last_beat.phase == "paused":
            # Whoever paused the run has not asked it to continue.
            with contextlib.suppress(OSError):
                submit(self._layout.control, "pause")
        message = f"{reason}; it is started again in {delay:.0f} s" + (f"; {change}" if change else "")
        self._notifier.send(f"STATUS={message}")
        _print(message)
        self._tell(
            "warning",
            ending.last_beat,
            code="restart",
            message=message,
            reason=reason,
            exit_code=ending.code if ending.code >= 0 else None,
            signal=-ending.code if ending.code < 0 else None,
            restart_number=self._num_restarts + 1,
            delay_seconds=delay,
        )

    def _finish(self, ending: Ending) -> int:
        """The exit code of the supervision, after a word in the events where the trainer could say none."""
        if self._has_begun and not ending.has_begun and ending.code == EXIT_ERROR:
            message = "the trainer could not be started again: its own error is in logs/daemon.log"
            self._tell("failed", ending.last_beat, message=message)
        if self._has_begun and ending.code == EXIT_NO_ROOM:
            message = "no room on the disk before the first step: the trainer's own error is in logs/daemon.log"
            self._tell("failed", ending.last_beat, message=message)
        if ending.code in (EXIT_CRASHED, EXIT_OUT_OF_MEMORY, EXIT_NO_ROOM):
            return EXIT_ERROR
        return ending.code if ending.code >= 0 else 128 - ending.code

    def _tell(self, kind: str, beat: Beat | None, **fields: Any) -> None:
        """Add an event to a run whose trainer is dead; one that somebody else has taken over is left alone."""
        step, attempt = (beat.step, beat.attempt) if beat else (None, 1)
        stage = {"stage": beat.stage} if beat and beat.stage else {}
        try:
            with RunLock(self._layout.lock), EventWriter(self._layout.events) as events:
                events.write(kind, step=step, attempt=attempt, **stage, **fields)
        except (RunFolderError, OSError) as error:
            _print(f"warning: this could not be written to the events: {error}")


def _has_ended(pid: int) -> bool:
    """Whether a child has ended; it stays a zombie, so its process id and group stay its own."""
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _free_bytes(path: Path) -> int:
    with contextlib.suppress(OSError):
        return shutil.disk_usage(path).free
    return 0


def _print(line: str) -> None:
    with contextlib.suppress(OSError):
        print(printable(line), file=sys.stderr, flush=True)
