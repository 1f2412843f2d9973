"""The heartbeat of a loop: speed and remaining time, told every few seconds.

Measured on a monotonic clock, over the steps since the last report; validations and checkpoints do not count.
"""

from __future__ import annotations

import time

import psutil

from cvm_translator.runs.events import EventWriter
from cvm_translator.training.state import LoopState

REPORT_EVERY_SECONDS = 5.0


class ProgressMeter:
    """Counts steps and tokens, and writes `progress` events."""

    def __init__(self, events: EventWriter, stage: str, num_iterations: int) -> None:
        self._events = events
        self._stage = stage
        self._num_iterations = num_iterations
        self.restart()

    def restart(self) -> None:
        """Begin to measure anew, after something that is not a step."""
        self._start, self._num_steps, self._num_tokens = time.monotonic(), 0, 0

    def count(self, num_tokens: int, state: LoopState) -> None:
        """Count one executed step; reports when it is time."""
        self._num_steps += 1
        self._num_tokens += num_tokens
        if time.monotonic() - self._start >= REPORT_EVERY_SECONDS:
            self.report(state)

    def report(self, state: LoopState) -> None:
        seconds = time.monotonic() - self._start
        if self._num_steps and seconds > 0:
            speed = self._num_steps / seconds
            self._events.write(
                "progress",
                step=state.step,
                attempt=state.attempt,
                stage=self._stage,
                num_iterations=self._num_iterations,
                steps_per_second=speed,
                tokens_per_second=self._num_tokens / seconds,
                eta_seconds=(self._num_iterations - state.step) / speed,
                memory_mib=psutil.Process().memory_info().rss / 2**20,
            )
        self.restart()
