"""The quality score: retentions against the teacher, weighted, never clipped from above."""

from __future__ import annotations

import numpy as np
import pytest

from cvm_translator.errors import ConfigError
from cvm_translator.metrics import build_metrics
from cvm_translator.metrics.resampling import resampling_counts
from cvm_translator.validation.quality import build_quality_scale, draw_scores

METRICS = build_metrics(["bleu", "chrf", "ter", "rouge", "exact_match"])
WEIGHTS = {"bleu": 1.0, "chrf": 1.0, "bertscore": 1.0, "ter": 0.5}
TEACHER = {
    "bleu": 40.0, "chrf": 60.0, "ter": 50.0, "rouge1": 60.0, "rouge2": 40.0, "rougeL": 50.0, "exact_match": 5.0
}  # fmt: skip


def test_the_teacher_has_quality_one() -> None:
    assert float(build_quality_scale(METRICS, WEIGHTS, TEACHER).quality(TEACHER)) == pytest.approx(1.0)


def test_quality_is_the_weighted_mean_of_the_retentions() -> None:
    scale = build_quality_scale(METRICS, WEIGHTS, TEACHER)
    student = TEACHER | {"bleu": 36.0, "chrf": 57.0, "ter": 60.0}
    assert scale.weights == {"bleu": 1.0, "chrf": 1.0, "ter": 0.5}
    assert float(scale.quality(student)) == pytest.approx((0.9 + 0.95 + 0.5 * 0.8) / 2.5)
    assert scale.retentions(student)["ter"] == pytest.approx(0.8)
    assert scale.retentions(student)["rouge2"] == pytest.approx(1.0)


def test_a_student_above_the_teacher_is_not_clipped_and_a_bad_ter_is_worth_nothing() -> None:
    scale = build_quality_scale(METRICS, WEIGHTS, TEACHER)
    assert float(scale.quality(TEACHER | {"bleu": 80.0})) == pytest.approx((2 + 1 + 0.5) / 2.5)
    assert scale.retentions(TEACHER | {"ter": 130.0})["ter"] == 0.0


def test_a_metric_on_which_the_teacher_is_poor_is_left_out() -> None:
    scale = build_quality_scale(METRICS, WEIGHTS, TEACHER | {"ter": 93.0})
    assert scale.left_out == ["ter"]
    assert float(scale.quality(TEACHER | {"ter": 0.0})) == pytest.approx(1.0)
    assert "exact_match" not in scale.retentions(TEACHER)


def test_the_weight_of_rouge_is_shared_by_its_three_scores() -> None:
    scale = build_quality_scale(METRICS, {"rouge": 1.0}, TEACHER)
    assert scale.weights == {name: pytest.approx(1 / 3) for name in ("rouge1", "rouge2", "rougeL")}


def test_weights_that_leave_nothing_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"validation.weights .*the teacher scores under 0.1 on all of bleu"):
        build_quality_scale(METRICS, {"bleu": 1.0}, TEACHER | {"bleu": 3.0})
    with pytest.raises(ConfigError, match=r"validation.weights"):
        build_quality_scale(METRICS, {"bertscore": 1.0}, TEACHER)


def test_without_a_teacher_the_values_themselves_count() -> None:
    scale = build_quality_scale(METRICS, {"bleu": 1.0, "ter": 1.0}, None)
    assert float(scale.quality(TEACHER)) == pytest.approx((0.4 + 0.5) / 2)
    assert scale.retentions(TEACHER) == {}


def test_a_missing_score_is_an_error() -> None:
    scale = build_quality_scale(METRICS, WEIGHTS, TEACHER)
    with pytest.raises(KeyError):
        scale.quality({"bleu": 1.0})


def test_draws_of_all_metrics_at_once_equal_those_of_each(corpus, evaluator) -> None:
    measurement = evaluator.evaluate(corpus.sources, corpus.translator(0.4)(corpus.sources), corpus.references)
    metrics = {metric.name: metric for metric in evaluator.metrics}
    counts = resampling_counts(len(corpus.sources), 20, seed=1)
    draws, failures = draw_scores(metrics, counts, measurement.statistics)
    assert failures == {}
    for name, metric in metrics.items():
        repeated = np.repeat(np.arange(len(corpus.sources)), counts[7])
        expected = metric.score(measurement.statistics[name][repeated].sum(axis=0))
        assert draws[name][7] == pytest.approx(float(expected))
