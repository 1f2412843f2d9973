"""COMET is an extra: without it there is an error that names the extra, and never another number."""

from __future__ import annotations

import importlib.util

import pytest

from cvm_translator.errors import MissingDependencyError
from cvm_translator.metrics import LIBRARIES, METRICS, build_metrics, require_libraries


@pytest.mark.skipif(importlib.util.find_spec("comet") is not None, reason="unbabel-comet is installed")
def test_a_missing_library_is_an_error_that_names_the_extra() -> None:
    with pytest.raises(MissingDependencyError, match=r"pip install 'cvm-translator\[comet\]'"):
        build_metrics(["bleu", "comet"])


def test_a_missing_metric_library_is_an_error_that_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "rouge_score.rouge_scorer", None)
    with pytest.raises(MissingDependencyError, match=r"rouge_score.*cvm-translator\[metrics\]"):
        build_metrics(["rouge"])


def test_every_metric_but_those_of_our_own_names_its_library() -> None:
    assert METRICS.keys() - LIBRARIES.keys() == {"exact_match"}
    require_libraries(["bleu", "chrf", "ter", "rouge", "bertscore", "exact_match"])
