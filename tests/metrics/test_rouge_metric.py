"""ROUGE against the rouge-score library."""

from __future__ import annotations

import numpy as np
import pytest
from rouge_score.rouge_scorer import RougeScorer

from cvm_translator.metrics.rouge import ROUGE_TYPES, Rouge

PAIRS = [
    ("File not found.", "The file was not found."),
    ("", "Something"),
    ("Same text here", "Same text here"),
    ("window the open", "open the window"),
    ("…", "…"),
]


@pytest.mark.parametrize("rouge_type", ROUGE_TYPES)
def test_score_is_the_librarys_mean_f_measure(rouge_type: str) -> None:
    scorer = RougeScorer([rouge_type])
    expected = 100 * np.mean([scorer.score(ref, hyp)[rouge_type].fmeasure for hyp, ref in PAIRS])
    metric = Rouge(rouge_type)
    statistics = metric.statistics([hyp for hyp, _ in PAIRS], [ref for _, ref in PAIRS])
    assert float(metric.score(statistics.sum(axis=0))) == pytest.approx(expected)


def test_word_order_matters_to_rouge_l_only() -> None:
    hypothesis, reference = PAIRS[3]
    scores = {
        name: float(Rouge(name).score(Rouge(name).statistics([hypothesis], [reference])[0])) for name in ROUGE_TYPES
    }
    assert scores["rouge1"] == pytest.approx(100.0)
    assert scores["rouge2"] == 0.0
    assert scores["rougeL"] == pytest.approx(100 / 3)


def test_an_unknown_type_is_refused() -> None:
    with pytest.raises(ValueError, match="rouge9"):
        Rouge("rouge9")
