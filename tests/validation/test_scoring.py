"""Scores from a process beside the caller's: the same numbers, and what becomes of it when it or its caller dies."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import psutil
import pytest

from cvm_translator.validation import TranslationQualityEvaluator, ValidationConfig
from cvm_translator.validation.scoring import ScoringFailed, ScoringProcess

pytestmark = pytest.mark.slow


@pytest.fixture
def scoring(config: ValidationConfig, corpus: Any) -> Iterator[ScoringProcess]:
    process = ScoringProcess(config, corpus.sources, corpus.references, num_threads=1)
    yield process
    process.close()


def wait_for_children(number: int) -> list[psutil.Process]:
    """Those of this process that score; loky also keeps one that tracks resources."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        found = [child for child in psutil.Process().children() if "popen_loky_posix" in " ".join(child.cmdline())]
        if len(found) == number:
            return found
        time.sleep(0.05)
    raise AssertionError(f"{number} scoring processes were expected")


def test_the_numbers_are_those_of_the_evaluator(
    scoring: ScoringProcess, evaluator: TranslationQualityEvaluator, corpus: Any
) -> None:
    waits: list[float] = []
    for error_rate in (0.1, 0.4):
        hypotheses = corpus.translator(error_rate)(corpus.sources)
        expected = evaluator.evaluate(corpus.sources, hypotheses, corpus.references)
        scoring.submit(hypotheses)
        assert scoring.is_busy
        measurement, seconds = scoring.collect(lambda: waits.append(time.monotonic()))
        assert not scoring.is_busy
        assert seconds > 0
        assert measurement.scores == expected.scores
        assert (measurement.set_sha256, measurement.signatures) == (expected.set_sha256, expected.signatures)
        for name, rows in expected.statistics.items():
            assert np.array_equal(measurement.statistics[name], rows), name
        for name, mask in expected.probes.items():
            assert np.array_equal(measurement.probes[name], mask), name
    assert waits  # the first time it had to start


def test_only_what_was_submitted_last_is_collected(scoring: ScoringProcess, corpus: Any) -> None:
    scoring.submit([""] * len(corpus.sources))
    scoring.submit(corpus.references)
    measurement, _ = scoring.collect(lambda: None)
    assert measurement.scores["bleu"] == pytest.approx(100.0)


def test_waiting_can_be_ended(scoring: ScoringProcess, corpus: Any) -> None:
    class Enough(Exception):
        pass

    def leave() -> None:
        raise Enough

    scoring.submit(corpus.references)
    with pytest.raises(Enough):
        scoring.collect(leave)
    scoring.close()
    wait_for_children(0)


def test_a_killed_process_is_told_and_the_next_one_works(scoring: ScoringProcess, corpus: Any) -> None:
    scoring.submit(corpus.references)
    (child,) = wait_for_children(1)
    child.kill()
    with pytest.raises(ScoringFailed, match="killed, most likely for want of memory"):
        scoring.collect(lambda: None)
    scoring.submit(corpus.references)
    measurement, _ = scoring.collect(lambda: None)
    assert measurement.scores["chrf"] == pytest.approx(100.0)


def test_it_leaves_signals_to_its_caller(scoring: ScoringProcess, corpus: Any) -> None:
    """Ctrl+C in a terminal reaches all processes of the group."""
    scoring.submit(corpus.references)
    scoring.collect(lambda: None)
    (child,) = wait_for_children(1)
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(child.pid, number)
    scoring.submit(corpus.references)
    assert scoring.collect(lambda: None)[0].failures == {}
    assert wait_for_children(1) == [child]


def test_an_error_there_gives_no_measurement(corpus: Any, scoring: ScoringProcess) -> None:
    """It may be for want of memory beside the training; the caller tries it, and has the last word."""
    scoring.submit([None] * len(corpus.sources))  # type: ignore[list-item]
    with pytest.raises(ScoringFailed, match="Error: "):
        scoring.collect(lambda: None)
    assert not scoring.is_busy


def test_an_evaluator_that_cannot_be_built_there_says_why(config: ValidationConfig, corpus: Any) -> None:
    settings = config.settings.model_copy(
        update={"metrics": ["bleu", "chrf", "bertscore"], "bertscore_model": "/no/such"}
    )
    changed = dataclasses.replace(config, settings=settings)
    process = ScoringProcess(changed, corpus.sources, corpus.references, num_threads=1)
    try:
        process.submit(corpus.references)
        with pytest.raises(ScoringFailed, match=r"ConfigError: .*bertscore_model '/no/such' cannot be loaded"):
            process.collect(lambda: None)
    finally:
        process.close()


PROGRAM = """
import time
from cvm_translator.config.schema import ValidationSettings
from cvm_translator.validation import ValidationConfig
from cvm_translator.validation.scoring import ScoringProcess

if __name__ == "__main__":
    config = ValidationConfig(settings=ValidationSettings(metrics=["bleu", "chrf"], weights={"bleu": 1, "chrf": 1}))
    scoring = ScoringProcess(config, ["a"], ["a b"], 1)
    scoring.submit(["a b"])
    scoring.collect(lambda: None)
    print("scored", flush=True)
    time.sleep(100)
"""


def test_it_vanishes_with_a_killed_caller() -> None:
    with subprocess.Popen([sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, text=True) as caller:
        assert caller.stdout is not None
        assert caller.stdout.readline() == "scored\n"
        children = psutil.Process(caller.pid).children(recursive=True)
        assert children
        caller.kill()
    gone, alive = psutil.wait_procs(children, timeout=20)
    assert len(gone) == len(children)
    assert not alive
