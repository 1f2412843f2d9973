"""The degradation detector: quiet on healthy runs, quick on real drops, undecided where it cannot know."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from cvm_translator.config.schema import ValidationSettings
from cvm_translator.validation import QualityDegradationDetector, TranslationQualityEvaluator, ValidationConfig, Verdict
from cvm_translator.validation.detector import describe_trend
from cvm_translator.validation.quality import build_quality_scale
from cvm_translator.validation.validator import compare_scores


def build_detector(config, evaluator, teacher) -> QualityDegradationDetector:
    scale = build_quality_scale(evaluator.metrics, config.settings.weights, teacher.scores if teacher else None)
    measured = teacher
    return QualityDegradationDetector(config, scale, measured.set_sha256, measured.num_sentences, teacher)


@pytest.fixture
def measure(corpus, evaluator):
    def measure(error_rate: float, seed: int = 0):
        hypotheses = corpus.translator(error_rate, seed)(corpus.sources)
        return evaluator.evaluate(corpus.sources, hypotheses, corpus.references)

    return measure


@pytest.fixture
def detector(config, evaluator, measure) -> QualityDegradationDetector:
    return build_detector(config, evaluator, measure(0.2, seed=99))


def test_the_first_is_the_best_and_a_better_one_follows_it(detector, measure) -> None:
    assert detector.judge(measure(0.5), 1000).verdict == "first"
    verdict = detector.judge(measure(0.3), 2000)
    assert verdict.verdict == "improved"
    assert verdict.is_new_best
    assert verdict.best_step == 1000
    assert detector.best_at == (2000, 1)
    assert verdict.quality_interval[0] < verdict.quality_score < verdict.quality_interval[1]


def test_a_large_drop_is_degraded_and_the_best_stays(detector, measure) -> None:
    detector.judge(measure(0.2), 1000)
    verdict = detector.judge(measure(0.6), 2000)
    assert verdict.verdict == "degraded"
    assert verdict.asks_for_rollback
    assert verdict.drop > verdict.drop_lower_bound > verdict.margin == 0.05
    assert detector.best_at == (1000, 1)


def test_a_small_drop_is_healthy(detector, measure) -> None:
    detector.judge(measure(0.2), 1000)
    verdict = detector.judge(measure(0.205, seed=0), 2000)
    assert verdict.verdict in ("healthy", "improved")
    assert not verdict.asks_for_rollback


def test_a_drop_that_noise_could_explain_is_a_warning(detector, measure) -> None:
    best = measure(0.2, seed=1)
    detector.judge(best, 1000)
    for error_rate in np.arange(0.2, 0.35, 0.01):
        new = measure(float(error_rate), seed=2)
        verdict = detector.compare(new, best, 1000)
        if verdict.drop > 0.05 >= verdict.drop_lower_bound:
            assert verdict.verdict == "warning"
            assert "not certain" in verdict.reason
            return
    pytest.fail("no error rate gave a drop between the margin and certainty")


def test_the_bound_is_the_quantile_of_the_resampled_drop(detector, measure) -> None:
    best, new = measure(0.2), measure(0.5)
    verdict = detector.compare(new, best, 1)
    counts, scale = detector.counts, detector.scale
    drops = []
    for row in counts[:200]:
        scores = [
            {name: float(scale.metrics[name].score(row @ rows)) for name, rows in measured.statistics.items()}
            for measured in (new, best, detector._teacher)
        ]
        drops.append(1 - scale.quality(scores[0], scores[2]) / scale.quality(scores[1], scores[2]))
    np.testing.assert_allclose(detector.drop_draws(new, best)[:200], drops)
    assert verdict.drop_lower_bound == pytest.approx(np.quantile(detector.drop_draws(new, best), 0.05))


@pytest.mark.parametrize("change", ["crash", "nan score", "nan statistics", "other set", "other set of the best"])
def test_no_decision(detector, measure, change: str) -> None:
    detector.judge(measure(0.2), 1000)
    state = detector.state_dict()
    new = measure(0.9)
    statistics = {**new.statistics, "bleu": np.full_like(new.statistics["bleu"], np.nan)}
    if change == "crash":
        new = replace(new, failures={"chrf": "RuntimeError: boom"})
    elif change == "nan score":
        new = replace(new, scores=new.scores | {"bleu": float("nan")})
    elif change == "nan statistics":
        new = replace(new, statistics=statistics)
    elif change == "other set":
        new = replace(new, set_sha256="0" * 64)
    else:
        detector.best = replace(detector.best, set_sha256="0" * 64)
    verdict = detector.judge(new, 2000)
    assert verdict.verdict == "no_decision"
    assert verdict.quality_score is None
    assert not verdict.asks_for_rollback
    assert not verdict.is_new_best
    assert detector.state_dict() == state


@pytest.mark.parametrize("fault", [np.nan, RuntimeError])
def test_a_metric_that_fails_on_resampled_sentences_is_no_decision_and_leaves_nothing_behind(
    detector, measure, monkeypatch: pytest.MonkeyPatch, fault: Any
) -> None:
    detector.judge(measure(0.2), 1000)
    detector._recent_draws.clear()  # as after a resume: the best is drawn again
    state = detector.state_dict()
    metric = detector.scale.metrics["bleu"]
    score = metric.score

    def fail(aggregate: Any) -> Any:
        if np.ndim(aggregate) == 1:
            return score(aggregate)
        if fault is RuntimeError:
            raise RuntimeError("boom")
        return score(aggregate) * np.nan

    with monkeypatch.context() as patch:
        patch.setattr(metric, "score", fail)
        verdict = detector.judge(measure(0.2), 2000)
        assert compare_scores(measure(0.3), detector.best, detector).keys() == detector.best.scores.keys() - {"bleu"}
    assert verdict.verdict == "no_decision"
    assert verdict.reason.startswith("bleu could not be computed on resampled sentences (")
    assert ("boom" if fault is RuntimeError else "bleu") in verdict.reason.partition("(")[2]
    assert detector.state_dict() == state
    verdict = detector.judge(measure(0.9), 3000)
    assert verdict.verdict == "degraded" and np.isfinite(verdict.drop_lower_bound)


def test_a_failed_metric_without_weight_does_not_stop_the_decision(detector, measure) -> None:
    new = measure(0.3)
    assert detector.judge(replace(new, failures={"rouge1": "RuntimeError: boom"}), 1000).verdict == "first"


@pytest.mark.parametrize("collapse", ["", "loop loop loop loop loop loop", "copy"])
def test_collapsed_output_is_an_emergency(corpus, evaluator, detector, measure, collapse: str) -> None:
    detector.judge(measure(0.2), 1000)
    hypotheses = [source if collapse == "copy" else collapse for source in corpus.sources]
    verdict = detector.judge(evaluator.evaluate(corpus.sources, hypotheses, corpus.references), 2000)
    assert verdict.verdict == "emergency"
    assert verdict.asks_for_rollback
    assert "empty, repeating or copied" in verdict.reason


def test_a_model_that_begins_collapsed_is_allowed_to_get_better(corpus, evaluator, detector, measure) -> None:
    empty = evaluator.evaluate(corpus.sources, [""] * len(corpus.sources), corpus.references)
    assert detector.judge(empty, 1000).verdict == "first"
    assert detector.judge(empty, 2000).verdict == "healthy"
    assert detector.judge(measure(0.5), 3000).verdict == "improved"


def test_a_restored_detector_goes_on_as_the_original(config, evaluator, detector, measure) -> None:
    measured = {1000: measure(0.4), 2000: measure(0.3), 3000: measure(0.32)}
    for step, measurement in measured.items():
        detector.judge(measurement, step)
    state = json.loads(json.dumps(detector.state_dict()))
    restored = build_detector(config, evaluator, detector._teacher)
    restored.load_state_dict(state, lambda step, attempt: measured[step])
    assert restored.judge(measure(0.5, 3), 4000, 2) == detector.judge(measure(0.5, 3), 4000, 2)
    assert restored.smallest_detectable_drop() == detector.smallest_detectable_drop()


# --------------------------------------------------------------------------------------------------- slow declines


@pytest.fixture
def judge_bounds(monkeypatch, measure):
    """Judges validations of which only the lower bound of the drop is told: the rest of `compare` is left out."""
    measurement = measure(0.2)

    def judge_bounds(detector, bounds, first_step: int = 0) -> list[Verdict]:
        verdicts = []
        for step, bound in enumerate(bounds, start=first_step):
            if bound is None:
                told = Verdict("first" if detector.best is None else "improved", "", 0.05, quality_score=1.0)
            else:
                told = Verdict("healthy", "dropped", 0.05, quality_score=1.0, drop_lower_bound=bound, best_step=0)
            monkeypatch.setattr(detector, "compare", lambda *_, told=told: told)
            verdicts.append(detector.judge(measurement, step))
        return verdicts

    return judge_bounds


def test_a_slow_decline_is_degraded_though_no_validation_is(detector, judge_bounds) -> None:
    """By 1.5 % each time, of which 0.9 % is noise: the fifth validation is still certain of less than the margin."""
    verdicts = judge_bounds(detector, [None, 0.006, 0.021, 0.036, 0.048])
    assert [verdict.verdict for verdict in verdicts] == ["first", "healthy", "healthy", "healthy", "degraded"]
    assert [verdict.drift for verdict in verdicts] == pytest.approx([0.0, 0.0, 0.0, 0.011, 0.034])
    assert verdicts[-1].asks_for_rollback
    assert verdicts[-1].reason == (
        "slow decline: since the best (step 0) the lower bounds of the drops, each less 2.5%, add up to 3.4%, limit "
        "3.0%; this validation dropped"
    )


def test_a_small_loss_that_stays_is_no_decline(detector, judge_bounds) -> None:
    assert {verdict.verdict for verdict in judge_bounds(detector, [None, *[0.025] * 100])} == {"first", "healthy"}


def test_a_new_best_and_a_recovery_end_a_decline(detector, judge_bounds) -> None:
    verdicts = judge_bounds(detector, [None, 0.05, 0.02, -0.02, 0.03, None, 0.03])
    assert [verdict.drift for verdict in verdicts] == pytest.approx([0.0, 0.025, 0.02, 0.0, 0.005, 0.0, 0.005])


def test_slow_declines_are_not_looked_for_without_a_limit(config, evaluator, measure, judge_bounds) -> None:
    config = replace(config, guard=config.guard.model_copy(update={"drift_limit": None}))
    detector = build_detector(config, evaluator, measure(0.2, seed=99))
    assert judge_bounds(detector, [None, *[0.049] * 9])[-1].verdict == "healthy"


def test_a_restored_detector_remembers_a_decline(config, evaluator, detector, judge_bounds, measure) -> None:
    judge_bounds(detector, [None, 0.03, 0.0345678901234567])
    restored = build_detector(config, evaluator, detector._teacher)
    restored.load_state_dict(json.loads(json.dumps(detector.state_dict())), lambda step, attempt: measure(0.2))
    assert judge_bounds(restored, [0.02], 3) == judge_bounds(detector, [0.02], 3)
    restored.start_new_best()
    assert restored.state_dict()["drift"] == 0.0


@pytest.mark.parametrize("kind", ["crash", "worse"])
def test_no_decision_adds_nothing_to_a_decline(detector, measure, kind: str) -> None:
    detector.judge(measure(0.2), 1000)
    detector.judge(measure(0.3), 2000)
    drift = detector.state_dict()["drift"]
    new = measure(0.35)
    verdict = detector.judge(replace(new, failures={"bleu": "boom"}) if kind == "crash" else new, 3000)
    assert drift > 0
    if kind == "crash":
        assert (verdict.verdict, verdict.drift, detector.state_dict()["drift"]) == ("no_decision", None, drift)
    else:
        assert verdict.drift == detector.state_dict()["drift"] > drift


def test_another_bit_width_starts_a_new_best(detector, measure) -> None:
    detector.judge(measure(0.2), 1000)
    detector.start_new_best()
    assert detector.judge(measure(0.6), 2000).verdict == "first"


def test_the_smallest_detectable_drop_shrinks_with_the_set_and_grows_with_the_power(make_corpus, config) -> None:
    evaluator = TranslationQualityEvaluator(config)
    drops = {}
    for size in (60, 240):
        corpus = make_corpus(size)
        teacher = evaluator.evaluate(corpus.sources, corpus.translator(0.3)(corpus.sources), corpus.references)
        detector = build_detector(config, evaluator, teacher)
        drops[size] = detector.smallest_detectable_drop() - 0.05
        assert 0 < detector.smallest_detectable_drop(0.5) - 0.05 < drops[size]
    assert drops[60] / drops[240] == pytest.approx(2.0, rel=0.35)


@pytest.mark.parametrize(
    ("qualities", "message"),
    [
        ([0.5], ""),
        ([0.5, 0.6, 0.7], "quality is rising by 0.1000 a validation over the last 3"),
        ([0.7, 0.6], "quality is falling by 0.1000 a validation over the last 2"),
        ([0.7, 0.7, 0.7], "quality is flat over the last 3 validations"),
    ],
)
def test_trend(qualities, message) -> None:
    assert describe_trend(qualities)[1] == message


def test_a_verdict_survives_json(detector, measure) -> None:
    detector.judge(measure(0.3), 1000)
    verdict = detector.judge(measure(0.5), 2000)
    assert Verdict.from_json(json.loads(json.dumps(verdict.to_json()))) == verdict


def test_simulated_runs(make_corpus) -> None:
    """Healthy checkpoints jitter and never alarm; a drop well beyond the smallest detectable one always does.

    Each checkpoint takes every sentence from one of several equally good systems, as checkpoints late in a run do. The
    long form, with thousands of runs, is benchmarks/reliability/detector.py.
    """
    settings = ValidationSettings(metrics=["bleu", "chrf"])
    config = ValidationConfig(settings=settings)
    evaluator = TranslationQualityEvaluator(config)
    corpus = make_corpus(600)
    generator = np.random.default_rng(5)

    def systems(error_rate: float) -> list:
        return [
            evaluator.evaluate(corpus.sources, corpus.translator(error_rate, seed)(corpus.sources), corpus.references)
            for seed in range(4)
        ]

    metrics = {metric.name: metric for metric in evaluator.metrics}

    def checkpoint(pool: list):
        choice = generator.integers(len(pool), size=len(corpus.sources))
        statistics = {
            name: np.stack([pool[k].statistics[name] for k in range(len(pool))])[choice, np.arange(len(choice))]
            for name in metrics
        }
        scores = {name: float(metrics[name].score(rows.sum(axis=0))) for name, rows in statistics.items()}
        return replace(pool[0], statistics=statistics, scores=scores)

    healthy, dropped = systems(0.3), systems(0.38)
    teacher = systems(0.25)[0]
    for _ in range(5):
        detector = build_detector(config, evaluator, teacher)
        verdicts = [detector.judge(checkpoint(healthy), 1000 * step).verdict for step in range(1, 7)]
        assert not {"degraded", "emergency"} & set(verdicts)
        verdict = detector.judge(checkpoint(dropped), 7000)
        assert verdict.drop > 0.1
        assert verdict.verdict == "degraded"
