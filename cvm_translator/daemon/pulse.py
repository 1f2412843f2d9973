"""Is the trainer still getting on? Read from its heartbeat, which carries the step.

A trainer hangs when nothing was heard of it for longer than what it was doing may take (`Patience`): in training for
twice the slowest step seen, with a floor. Time is counted in the supervisor's own ticks on a monotonic clock, so a
machine that slept, a frozen process group or a wall clock that jumps makes no hang.
"""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import dataclass

from cvm_translator.runs.heartbeat import Beat, parse_beat

_MAX_PARTIAL_BYTES = 1000


@dataclass(frozen=True)
class Patience:
    """Seconds without a beat after which a trainer counts as hung, by what it was doing."""

    step_factor: float = 2.0
    """In training: so many times the slowest step seen since the trainer began this stage, and at least `step`."""
    step: float = 60.0
    first_step: float = 600.0
    """Until a step has been seen: the first one may compile, or read cold files."""
    paused: float = 60.0
    waiting: float = 60.0
    validation: float = 1800.0
    """Beats come with each decoded batch; scoring comes after the last of them."""
    save: float = 1800.0
    begun: float = 600.0
    """From the start of the process to its run_started event: libraries are imported."""
    stage: float = 21600.0
    """All other work of a stage, which beats only now and then: downloads, cleaning, the gate's translations in other
    processes, the report. Better late than to end a large corpus again and again."""


class Pulse:
    """The supervisor's end of the pipe."""

    def __init__(self, descriptor: int, patience: Patience, tick_seconds: float) -> None:
        self.beat: Beat | None = None
        self.has_stepped = False
        """Whether the trainer has come to its first step."""
        self.slowest_step_seconds: float | None = None
        self.descriptor: int | None = descriptor
        """To be waited for; None once the trainer has closed its end."""
        self._patience = patience
        self._longest_tick = 2 * tick_seconds
        self._silence = 0.0
        self._last_tick = time.monotonic()
        self._partial = b""

    @property
    def has_begun(self) -> bool:
        return self.beat is not None

    @property
    def silence_seconds(self) -> float:
        return self._silence

    def read(self) -> None:
        """Take in what was beaten since the last call, and let the clock go on."""
        now = time.monotonic()
        self._silence += min(now - self._last_tick, self._longest_tick)
        self._last_tick = now
        beats = self._read_beats()
        if not beats:
            return
        num_steps = sum(beat.phase == "step" for beat in beats)
        self.has_stepped |= num_steps > 0
        for beat in beats:
            last = self.beat
            if last is None or last.stage != beat.stage:
                self.slowest_step_seconds = None
            elif last.phase == beat.phase == "step":
                self.slowest_step_seconds = max(self.slowest_step_seconds or 0.0, self._silence / num_steps)
            self.beat = beat
        self._silence = 0.0

    def _read_beats(self) -> list[Beat]:
        data = b""
        with contextlib.suppress(BlockingIOError):
            while self.descriptor is not None:
                piece = os.read(self.descriptor, 1 << 16)
                data += piece
                if not piece:
                    self.descriptor = None
        *lines, self._partial = (self._partial + data).split(b"\n")
        self._partial = self._partial[-_MAX_PARTIAL_BYTES:]
        return [beat for line in lines if (beat := parse_beat(line)) is not None]

    def allowance_seconds(self) -> float:
        """How long the trainer may be silent at what it is doing now."""
        patience, phase = self._patience, self.beat.phase if self.beat else "begun"
        if phase == "step":
            if self.slowest_step_seconds is None:
                return patience.first_step
            return max(patience.step, patience.step_factor * self.slowest_step_seconds)
        seconds: float = getattr(patience, phase if self.beat is None or phase != "begun" else "stage")
        return seconds

    def is_hung(self) -> bool:
        return self._silence > self.allowance_seconds()

    def describe(self) -> str:
        """Where the trainer is, in words."""
        if self.beat is None:
            return "before its run began"
        if self.beat.phase in ("begun", "stage"):
            return f"in stage {self.beat.stage}" if self.beat.stage else "at its beginning"
        where = f"{self.beat.stage} step {self.beat.step}"
        names = {"step": "at", "paused": "paused at", "waiting": "waiting for room on the disk at"}
        return f"{names.get(self.beat.phase, f'in the {self.beat.phase} at')} {where}"
