"""The heartbeat of a loop: speed, remaining time and mean loss, told every few seconds.

Measured on a monotonic clock; validations and checkpoints do not count. The losses are means over the real target
tokens since the last report. Batches differ in length, so speed is smoothed: what lies half a minute of training back
weighs half. Utilisation is the arithmetic of the steps over what the processor could have done in their time.
"""

from __future__ import annotations

import time

import psutil

from cvm_translator.runs.events import EventWriter
from cvm_translator.training.state import LoopState
from cvm_translator.training.step import StepResult

REPORT_EVERY_SECONDS = 5.0
HALF_LIFE_SECONDS = 30.0
LOSSES = ("loss", "distillation_loss", "task_loss")


class ProgressMeter:
    """Counts steps and tokens, and writes `progress` events."""

    def __init__(self, events: EventWriter, stage: str, num_iterations: int, peak: float | None = None) -> None:
        """`peak`: floating-point operations that the processor can do in a second, if that is known."""
        self._events = events
        self._stage = stage
        self._num_iterations = num_iterations
        self._peak = peak
        self._past = (0.0, 0.0, 0.0, 0.0)
        """Steps, tokens, operations and seconds so far, each weighted by its age."""
        self.restart()

    def restart(self) -> None:
        """Begin to measure anew, after something that is not a step."""
        self._start, self._num_steps, self._num_tokens, self._num_flops = time.monotonic(), 0, 0, 0.0
        self._loss_sums, self._num_loss_tokens = dict.fromkeys(LOSSES, 0.0), 0

    def count(self, result: StepResult, state: LoopState, num_flops: float = 0.0) -> None:
        """Count one executed step of so many operations; reports when it is time."""
        self._num_steps += 1
        self._num_flops += num_flops
        self._num_tokens += result.num_tokens
        if result.rejected is None:
            for name in LOSSES:
                self._loss_sums[name] += getattr(result, name) * result.num_tokens
            self._num_loss_tokens += result.num_tokens
        if time.monotonic() - self._start >= REPORT_EVERY_SECONDS:
            self.report(state)

    def report(self, state: LoopState) -> None:
        seconds = time.monotonic() - self._start
        if self._num_steps and seconds > 0:
            decay = 0.5 ** (seconds / HALF_LIFE_SECONDS)
            now = (self._num_steps, self._num_tokens, self._num_flops, seconds)
            steps, tokens, flops, smoothed_seconds = self._past = tuple(
                decay * old + new for old, new in zip(self._past, now, strict=True)
            )
            speed = steps / smoothed_seconds
            self._events.write(
                "progress",
                step=state.step,
                attempt=state.attempt,
                stage=self._stage,
                num_iterations=self._num_iterations,
                steps_per_second=speed,
                tokens_per_second=tokens / smoothed_seconds,
                eta_seconds=(self._num_iterations - state.step) / speed,
                utilisation=flops / smoothed_seconds / self._peak if self._peak else None,
                **{
                    name: total / self._num_loss_tokens if self._num_loss_tokens else None
                    for name, total in self._loss_sums.items()
                },
                memory_mib=psutil.Process().memory_info().rss / 2**20,
            )
        self.restart()
