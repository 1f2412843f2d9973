"""Scoring in one process beside the caller's, where there are cores that training leaves free.

Guarantees: the numbers are those of `TranslationQualityEvaluator`, with whose code and settings they are computed; the
process starts with the first hypotheses, leaves signals to its caller and ends with it however it ends. What it cannot
finish, killed or out of memory, is told by `ScoringFailed`, so that the caller can score in its own process.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future

import loky
import torch
from loky.process_executor import BrokenProcessPool

from cvm_translator.runs.followers import follow
from cvm_translator.validation.config import ValidationConfig
from cvm_translator.validation.evaluator import QualityMeasurement, TranslationQualityEvaluator

LOOK_SECONDS = 0.2

Scored = tuple[QualityMeasurement, float]
"""A measurement and the seconds that it took."""


class ScoringFailed(Exception):
    """The process gave no measurement, or one with a metric that failed in it."""


class ScoringProcess:
    """Scores hypotheses of one validation set, one list at a time.

    `num_threads` are for the neural metrics' arithmetic. The evaluator must have been built once by the caller, so that
    a missing library is an error before the first step.
    """

    def __init__(
        self, config: ValidationConfig, sources: Sequence[str], references: Sequence[str], num_threads: int
    ) -> None:
        self._given = (config, list(sources), list(references), num_threads)
        self._executor: loky.ProcessPoolExecutor | None = None
        self._future: Future[Scored] | None = None

    @property
    def is_busy(self) -> bool:
        """Whether a measurement was asked for and not yet collected."""
        return self._future is not None

    def submit(self, hypotheses: list[str]) -> None:
        """Begin to score; what was submitted before and not collected is forgotten."""
        if self._executor is None:
            self._executor = loky.ProcessPoolExecutor(1, initializer=_begin, initargs=(os.getpid(), *self._given))
        self._future = self._executor.submit(_score, hypotheses)

    def collect(self, on_wait: Callable[[], object]) -> Scored:
        """The measurement, waited for; `on_wait` is called meanwhile, and what it raises ends the waiting."""
        assert self._future is not None
        while not self._future.done():
            on_wait()
            time.sleep(LOOK_SECONDS)
        future, self._future = self._future, None
        try:
            scored = future.result()
        except BrokenProcessPool as error:
            self.close()
            raise ScoringFailed("the process was killed, most likely for want of memory") from error
        except Exception as error:  # the caller, who scores next, will meet it too if it is not one of this process
            raise ScoringFailed(f"{type(error).__name__}: {error}") from error
        if scored[0].failures:
            name, reason = next(iter(scored[0].failures.items()))
            raise ScoringFailed(f"{name}: {reason}")
        return scored

    def close(self) -> None:
        """End the process, whatever it is doing."""
        if self._executor is not None:
            self._executor.shutdown(wait=True, kill_workers=True)
        self._executor, self._future = None, None


# ------------------------------------------------------------------------------------------ in the process itself

_given: tuple[ValidationConfig, list[str], list[str]]


def _begin(caller: int, config: ValidationConfig, sources: list[str], references: list[str], num_threads: int) -> None:
    global _given
    follow(caller)
    torch.set_num_threads(num_threads)
    _given = config, sources, references


@functools.cache
def _build_evaluator() -> TranslationQualityEvaluator:
    """With the first hypotheses: an error in `_begin` would reach the caller as a killed process."""
    return TranslationQualityEvaluator(_given[0])


def _score(hypotheses: list[str]) -> Scored:
    evaluator, (_, sources, references) = _build_evaluator(), _given
    began = time.perf_counter()
    return evaluator.evaluate(sources, hypotheses, references), time.perf_counter() - began
