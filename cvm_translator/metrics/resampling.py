"""The bootstrap over sentences (Efron 1979; for paired systems Koehn 2004), by weighted sums of stored statistics.

Guarantees: `num_draws` resampled corpora are one (draws, N) matrix of counts made from a seed. The same matrix applied
to several systems' statistics pairs the comparison: each draw holds the same sentences for all of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cvm_translator.metrics.base import FloatArray, Metric

CountArray = NDArray[np.uint16]

ROWS_AT_ONCE = 256  # of counts turned into float64 for one matrix product


def resampling_counts(num_sentences: int, num_draws: int, seed: int) -> CountArray:
    """How often each draw picks each sentence: (draws, N), every row summing to N."""
    if num_sentences < 1 or num_draws < 1:
        raise ValueError(f"cannot resample {num_sentences} sentences {num_draws} times")
    generator = np.random.default_rng(seed)
    counts = np.empty((num_draws, num_sentences), dtype=np.uint16)
    for row in counts:
        row[:] = np.bincount(generator.integers(num_sentences, size=num_sentences), minlength=num_sentences)
    return counts


def resample(counts: CountArray, statistics: FloatArray) -> FloatArray:
    """Summed statistics of each draw: (draws, N) with (N, K) gives (draws, K)."""
    if counts.shape[1] != len(statistics):
        raise ValueError(f"statistics of {len(statistics)} sentences do not fit draws of {counts.shape[1]}")
    blocks = [
        counts[start : start + ROWS_AT_ONCE].astype(np.float64) @ statistics
        for start in range(0, len(counts), ROWS_AT_ONCE)
    ]
    return np.concatenate(blocks)


def confidence_interval(draws: FloatArray, confidence: float = 0.95) -> tuple[float, float]:
    """Two-sided percentile interval of the drawn values."""
    tail = (1.0 - confidence) / 2.0
    low, high = np.quantile(draws, [tail, 1.0 - tail])
    return float(low), float(high)


@dataclass(frozen=True)
class PairedComparison:
    """Two systems on one metric: b minus a, on the metric's own scale."""

    metric: str
    score_a: float
    score_b: float
    difference: float
    interval: tuple[float, float]
    """95 % interval of the difference."""
    p_value: float
    """Two-sided, for the hypothesis that the systems do not differ."""


def paired_p_value(difference: float, draws: FloatArray) -> float:
    """Two-sided p-value of a difference: how often the centred draws stray at least as far (add-one corrected)."""
    strays = np.abs(draws - draws.mean()) >= abs(difference) - 1e-12
    return float((strays.sum() + 1) / (len(draws) + 1))


def paired_bootstrap(
    metric: Metric, statistics_a: FloatArray, statistics_b: FloatArray, counts: CountArray
) -> PairedComparison:
    """Compare two systems on the same sentences, each (N, K), under the same draws."""
    score_a = float(metric.score(statistics_a.sum(axis=0)))
    score_b = float(metric.score(statistics_b.sum(axis=0)))
    draws = metric.score(resample(counts, statistics_b)) - metric.score(resample(counts, statistics_a))
    difference = score_b - score_a
    return PairedComparison(
        metric.name, score_a, score_b, difference, confidence_interval(draws), paired_p_value(difference, draws)
    )
