"""ROUGE-1, ROUGE-2 and ROUGE-L: mean F-measures of the sentences (Lin 2004), through the rouge-score library.

Guarantees: numbers equal the mean of `rouge_score.rouge_scorer.RougeScorer` F-measures without stemming, times 100.
Note that its tokeniser keeps only a..z and 0..9: for targets in other scripts ROUGE says nothing and scores 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version

from cvm_translator.errors import import_optional
from cvm_translator.metrics.base import FloatArray, MeanMetric, check_finite, check_pairs

ROUGE_TYPES = ("rouge1", "rouge2", "rougeL")


class Rouge(MeanMetric):
    """One ROUGE type."""

    def __init__(self, rouge_type: str) -> None:
        if rouge_type not in ROUGE_TYPES:
            raise ValueError(f"unknown ROUGE type {rouge_type!r}; known: {', '.join(ROUGE_TYPES)}")
        self.name = rouge_type
        module = import_optional("rouge_score.rouge_scorer", "metrics")
        self._scorer = module.RougeScorer([rouge_type], use_stemmer=False)

    def signature(self) -> str:
        return f"{self.name}|measure:f1|stemmer:no|rouge-score:{version('rouge-score')}"

    def statistics(
        self, hypotheses: Sequence[str], references: Sequence[str], sources: Sequence[str] | None = None
    ) -> FloatArray:
        check_pairs(hypotheses, references)
        values = [
            self._scorer.score(reference, hypothesis)[self.name].fmeasure
            for hypothesis, reference in zip(hypotheses, references, strict=True)
        ]
        return check_finite(self.name, self.as_statistics(values))
