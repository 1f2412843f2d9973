"""The gate's judge: the finished models against their teacher, on a set that no decision has seen.

Meant to run in a fresh process on models loaded from their files. Guarantees: teacher and models translate the same
sentences; every number comes with a 95 % interval from one paired bootstrap; the loss from teacher to student and the
loss from float to quantised are told apart. The gate asks for point estimates of the retention of Q, BLEU and chrF.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np

from cvm_translator.errors import CorpusError
from cvm_translator.metrics.base import FloatArray
from cvm_translator.metrics.resampling import confidence_interval, paired_p_value
from cvm_translator.validation.analysis import analyse_errors
from cvm_translator.validation.config import ValidationConfig
from cvm_translator.validation.detector import QualityDegradationDetector
from cvm_translator.validation.evaluator import QualityMeasurement, TranslationQualityEvaluator
from cvm_translator.validation.quality import MIN_DENOMINATOR, build_quality_scale

Translate = Callable[[list[str]], list[str]]
GATED = ("quality", "bleu", "chrf")


@dataclass(frozen=True)
class Judgement:
    """Plain data of the report, and every hypothesis by model."""

    report: dict[str, Any]
    hypotheses: dict[str, list[str]] = field(repr=False)

    @property
    def passed(self) -> bool:
        return bool(self.report["gate"]["passed"])


@dataclass(frozen=True)
class _Estimate:
    """A point estimate and its draws."""

    value: float
    draws: FloatArray

    def to_json(self) -> dict[str, float]:
        low, high = confidence_interval(self.draws)
        return {"value": self.value, "low": low, "high": high}


def judge_models(
    config: ValidationConfig,
    sources: Sequence[str],
    references: Sequence[str],
    teacher: Translate,
    models: Mapping[str, Translate],
    gated: str,
    evaluator: TranslationQualityEvaluator | None = None,
) -> Judgement:
    """Translate, score and compare.

    `models` by name, from the least to the most reduced (`float`, then `int8`); `gated` names the delivered one.
    """
    if gated not in models:
        raise ValueError(f"the gated model {gated!r} is not among {', '.join(models)}")
    evaluator = evaluator or TranslationQualityEvaluator(config)
    hypotheses: dict[str, list[str]] = {}
    seconds: dict[str, float] = {}
    measurements: dict[str, QualityMeasurement] = {}
    for name, translate in {"teacher": teacher, **models}.items():
        began = time.perf_counter()
        hypotheses[name] = translate(list(sources))
        seconds[name] = time.perf_counter() - began
        measurements[name] = evaluator.evaluate(sources, hypotheses[name], references)
        for metric, reason in measurements[name].failures.items():
            raise CorpusError(f"gate: {metric} cannot be computed on the output of {name}: {reason}")
    scale = build_quality_scale(evaluator.metrics, config.settings.weights, measurements["teacher"].scores)
    first = measurements["teacher"]
    detector = QualityDegradationDetector(config, scale, first.set_sha256, first.num_sentences, first)
    retentions = {name: _retentions(detector, measurements[name], first) for name in models}
    described = {name: _describe(detector, measurements[name], seconds[name]) for name in measurements}
    for name in models:
        described[name]["retentions"] = {key: estimate.to_json() for key, estimate in retentions[name].items()}
        described[name]["error_analysis"] = analyse_errors(
            scale.metrics, measurements[name], sources, hypotheses[name], references, first, hypotheses["teacher"]
        )
    report = {
        "set_sha256": first.set_sha256,
        "num_sentences": first.num_sentences,
        "weights": scale.weights,
        "left_out": scale.left_out,
        "signatures": first.signatures,
        "teacher": described["teacher"],
        "models": {name: described[name] for name in models},
        "gaps": _describe_gaps(detector, measurements, retentions),
        "gate": judge_gate(gated, retentions[gated], config.guard.quality_threshold),
    }
    return Judgement(report, hypotheses)


def _retentions(
    detector: QualityDegradationDetector, model: QualityMeasurement, teacher: QualityMeasurement
) -> dict[str, _Estimate]:
    """Q and each metric's student/teacher; a metric on which the teacher is worthless is missing."""
    scale = detector.scale
    estimates = {"quality": _Estimate(detector.quality(model), detector.quality_draws(model))}
    values, teacher_values = scale.values(model.scores), scale.values(teacher.scores)
    draws = scale.values(dict(detector.draw_scores(model)))
    teacher_draws = scale.values(dict(detector.draw_scores(teacher)))
    for name, value in values.items():
        if teacher_values[name] > MIN_DENOMINATOR:
            ratio = draws[name] / np.maximum(teacher_draws[name], MIN_DENOMINATOR)
            estimates[name] = _Estimate(float(value / teacher_values[name]), ratio)
    return estimates


def _describe(
    detector: QualityDegradationDetector, measurement: QualityMeasurement, decode_seconds: float
) -> dict[str, Any]:
    return {
        "scores": measurement.scores,
        "intervals": {name: confidence_interval(draws) for name, draws in detector.draw_scores(measurement).items()},
        "probes": measurement.probe_counts,
        "length_ratio": measurement.length_ratio,
        "decode_seconds": decode_seconds,
        "decode_sentences_per_second": measurement.num_sentences / decode_seconds if decode_seconds > 0 else None,
    }


def _describe_gaps(
    detector: QualityDegradationDetector,
    measurements: Mapping[str, QualityMeasurement],
    retentions: Mapping[str, Mapping[str, _Estimate]],
) -> list[dict[str, Any]]:
    """What each step of the reduction costs: teacher to the first model, then from model to model.

    Losses are positive when the later one is worse: of Q in shares of the teacher's quality, of metrics on their scale.
    """
    gaps = []
    chain = ["teacher", *retentions]
    for before, after in pairwise(chain):
        quality = retentions[after]["quality"]
        previous = retentions[before]["quality"] if before != "teacher" else _Estimate(1.0, np.ones_like(quality.draws))
        loss = _Estimate(previous.value - quality.value, previous.draws - quality.draws)
        draws_before = detector.draw_scores(measurements[before])
        draws_after = detector.draw_scores(measurements[after])
        metrics = {}
        for name, score in measurements[after].scores.items():
            difference = _Estimate(score - measurements[before].scores[name], draws_after[name] - draws_before[name])
            metrics[name] = difference.to_json() | {"p_value": paired_p_value(difference.value, difference.draws)}
        gaps.append(
            {
                "from": before,
                "to": after,
                "quality_loss": loss.to_json() | {"p_value": paired_p_value(loss.value, loss.draws)},
                "score_differences": metrics,
            }
        )
    return gaps


def judge_gate(model: str, retentions: Mapping[str, _Estimate], threshold: float) -> dict[str, Any]:
    """Whether Q, BLEU and chrF each keep at least `threshold` of the teacher's, and by how much they do not."""
    requirements, failures = [], []
    for name in GATED:
        estimate = retentions.get(name)
        label = "quality score" if name == "quality" else {"bleu": "BLEU", "chrf": "chrF"}[name]
        if estimate is None:
            requirements.append({"name": name, "threshold": threshold, "passed": False, "retention": None})
            failures.append(f"{label}: the teacher itself scores 0, so that no retention can be shown")
            continue
        passed = estimate.value >= threshold
        requirements.append({"name": name, "threshold": threshold, "passed": passed, "retention": estimate.to_json()})
        if not passed:
            failures.append(
                f"{label} keeps {estimate.value:.1%} of the teacher's, {threshold - estimate.value:.1%} short of "
                f"guard.quality_threshold {threshold:.1%}"
            )
    return {
        "model": model,
        "threshold": threshold,
        "passed": not failures,
        "requirements": requirements,
        "failures": failures,
    }
