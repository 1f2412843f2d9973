"""The bootstrap: its invariants, and numbers known from theory."""

from __future__ import annotations

import numpy as np
import pytest

from cvm_translator.metrics.resampling import (
    confidence_interval,
    paired_bootstrap,
    paired_p_value,
    resample,
    resampling_counts,
)
from cvm_translator.metrics.surface import Chrf, ExactMatch


def test_every_draw_picks_as_many_sentences_as_there_are() -> None:
    counts = resampling_counts(50, 300, seed=1)
    assert counts.shape == (300, 50)
    assert (counts.sum(axis=1) == 50).all()
    assert counts.mean() == 1.0


def test_the_seed_fixes_the_draws() -> None:
    np.testing.assert_array_equal(resampling_counts(20, 10, seed=5), resampling_counts(20, 10, seed=5))
    assert (resampling_counts(20, 10, seed=5) != resampling_counts(20, 10, seed=6)).any()


def test_resampling_is_summing_the_picked_rows() -> None:
    statistics = np.random.default_rng(0).normal(size=(30, 4))
    counts = resampling_counts(30, 700, seed=2)  # more than one block
    picked = np.repeat(np.arange(30), counts[600])
    np.testing.assert_allclose(resample(counts, statistics)[600], statistics[picked].sum(axis=0))
    with pytest.raises(ValueError, match="29 sentences do not fit draws of 30"):
        resample(counts, statistics[:29])


def test_the_spread_of_a_mean_is_its_standard_error() -> None:
    values = np.random.default_rng(1).random(400)
    statistics = np.stack([values, np.ones(400)], axis=1)
    sums = resample(resampling_counts(400, 4000, seed=3), statistics)
    assert (sums[:, 0] / sums[:, 1]).std() == pytest.approx(values.std() / 20, rel=0.05)


def test_the_interval_holds_the_stated_share() -> None:
    draws = np.arange(1001) / 1000
    assert confidence_interval(draws, 0.95) == pytest.approx((0.025, 0.975))


def test_a_system_does_not_differ_from_itself() -> None:
    references = [f"sentence number {index} of this set" for index in range(40)]
    metric = Chrf()
    statistics = metric.statistics([text.replace("number", "no.") for text in references], references)
    result = paired_bootstrap(metric, statistics, statistics, resampling_counts(40, 500, seed=4))
    assert result.difference == 0
    assert result.interval == (0.0, 0.0)
    assert result.p_value == 1.0


def test_a_clear_difference_is_significant_and_noise_is_not() -> None:
    generator = np.random.default_rng(7)
    metric = ExactMatch()
    counts = resampling_counts(500, 2000, seed=8)

    def system(share: float) -> np.ndarray:
        return metric.as_statistics((generator.random(500) < share).astype(float))

    worse, better = system(0.4), system(0.6)
    result = paired_bootstrap(metric, worse, better, counts)
    assert result.p_value < 0.01
    assert result.interval[0] > 0
    p_values = [paired_bootstrap(metric, system(0.5), system(0.5), counts).p_value for _ in range(40)]
    assert np.mean(np.asarray(p_values) < 0.05) < 0.2
    assert 0.3 < np.mean(p_values) < 0.7


def test_a_p_value_is_never_zero() -> None:
    assert paired_p_value(5.0, np.zeros(999)) == pytest.approx(0.001)
