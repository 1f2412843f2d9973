"""What a metric is: statistics of sentences, a score of their sum, and the signature that makes it reproducible.

Guarantees: a metric turns N pairs of strings into an (N, K) float64 array of *sufficient statistics*, one row a
sentence, and any sum of such rows into a score. A resampled corpus is a weighted sum of rows, so resampling never
scores a sentence again. Non-finite statistics are refused with ValueError; no metric answers with a stand-in number.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]


class Metric(Protocol):
    """Computes one number from hypotheses and references."""

    name: str

    def signature(self) -> str:
        """Everything someone else needs to get the same number (library, version, options)."""

    def statistics(
        self, hypotheses: Sequence[str], references: Sequence[str], sources: Sequence[str] | None = None
    ) -> FloatArray:
        """Per-sentence sufficient statistics, shape (N, K). `sources` is for metrics that read the source too."""

    def score(self, aggregate: FloatArray) -> FloatArray:
        """Scores (...) of summed statistics (..., K), on the metric's customary scale."""

    def retention_value(self, score: FloatArray) -> FloatArray:
        """The score on the scale on which higher is better, 0 is worthless, and 1 is a perfect match."""


class MeanMetric:
    """A metric whose corpus score is the mean of its sentence scores: statistics are (value, 1)."""

    scale = 100.0

    def score(self, aggregate: FloatArray) -> FloatArray:
        total, count = aggregate[..., 0], aggregate[..., 1]
        return np.asarray(self.scale * total / count, dtype=np.float64)

    def retention_value(self, score: FloatArray) -> FloatArray:
        return np.asarray(np.maximum(0.0, np.asarray(score) / self.scale), dtype=np.float64)

    def as_statistics(self, values: Sequence[float] | FloatArray) -> FloatArray:
        column = np.asarray(values, dtype=np.float64)
        return np.stack([column, np.ones_like(column)], axis=-1)  # (N, 2)


def check_pairs(hypotheses: Sequence[str], references: Sequence[str]) -> None:
    """Refuse lists that cannot be compared line by line."""
    if len(hypotheses) != len(references):
        raise ValueError(f"{len(hypotheses)} hypotheses do not match {len(references)} references")
    if not references:
        raise ValueError("no sentences to score")


def check_finite(name: str, statistics: FloatArray, row_name: str = "sentence") -> FloatArray:
    """Return the statistics, or raise ValueError when one of them is NaN or infinite; `row_name`: what a row is."""
    finite = np.isfinite(statistics)
    if not finite.all():
        row = int(np.argwhere(~finite)[0][0])
        raise ValueError(f"{name} is not a number for {row_name} {row + 1}")
    return statistics
