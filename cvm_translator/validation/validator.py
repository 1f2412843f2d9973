"""One validation, from decoding to the files in `validation/`: translate, score, compare, judge, write.

The scoring may be made elsewhere (see `scoring`): `translate` comes before it and `conclude` after it.

Guarantees: the teacher is decoded once and reused for the same teacher and set; the set's SHA-256 stands in every
record; a resumed process reads statistics instead of scoring again. Records are whole or absent (see `files`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cvm_translator.errors import CorpusError
from cvm_translator.metrics.resampling import confidence_interval, paired_p_value
from cvm_translator.runs.atomic import write_text
from cvm_translator.validation.analysis import analyse_errors
from cvm_translator.validation.config import ValidationConfig
from cvm_translator.validation.detector import QualityDegradationDetector, Verdict
from cvm_translator.validation.evaluator import (
    QualityMeasurement,
    TranslationQualityEvaluator,
    compute_set_sha256,
)
from cvm_translator.validation.files import ValidationFiles, read_hypotheses, validation_stem
from cvm_translator.validation.quality import build_quality_scale
from cvm_translator.validation.report import format_best_report
from cvm_translator.validation.result import ValidationResult

Translate = Callable[[list[str]], list[str]]
TEACHER = "teacher"


class DistillationValidator:
    """Validates one model on one frozen set.

    Call `score_teacher` first where there is a teacher; without it (while the teacher itself is trained) Q is the
    weighted mean of the model's own values. `count_tokens` turns texts into a token count for the decoding speed. An
    `evaluator` may be shared between validators, since it holds the encoder.
    """

    def __init__(
        self,
        config: ValidationConfig,
        directory: Path,
        sources: Sequence[str],
        references: Sequence[str],
        evaluator: TranslationQualityEvaluator | None = None,
        count_tokens: Callable[[list[str]], int] | None = None,
    ) -> None:
        if not sources or len(sources) != len(references):
            raise CorpusError(
                f"the validation set has {len(sources)} sources and {len(references)} references: it needs as many of "
                "one as of the other, and at least one pair"
            )
        self.config = config
        self.sources = list(sources)
        self.references = list(references)
        self.set_sha256 = compute_set_sha256(sources, references)
        self.files = ValidationFiles(directory)
        self.asked_files = ValidationFiles(directory / "asked")
        self.evaluator = evaluator or TranslationQualityEvaluator(config)
        self.metrics = {metric.name: metric for metric in self.evaluator.metrics}
        self.count_tokens = count_tokens
        self.teacher: QualityMeasurement | None = None
        self.teacher_hypotheses: list[str] | None = None
        self.teacher_extra: dict[str, Any] = {}
        self.detector = self._build_detector()
        self._reference_at: tuple[int, int] | None = None
        self._reference: QualityMeasurement | None = None
        self._previous_at: tuple[int, int] | None = None
        self._previous: QualityMeasurement | None = None
        self._previous_counts: dict[str, int] | None = None

    # ------------------------------------------------------------------------------------------------ teacher

    def score_teacher(
        self, translate: Translate, teacher_sha256: str, measure_extra: Callable[[], dict[str, Any]] = dict
    ) -> dict[str, Any]:
        """Decode and score the teacher, or reuse what is on disk for this teacher, set and beam size.

        `measure_extra` gives what validations measure beside the text (their `extra`), of the teacher. Returns the
        record kept in teacher.json. A metric that fails here is an error: there is nothing to compare with.
        """
        key = {
            "teacher_sha256": teacher_sha256,
            "set_sha256": self.set_sha256,
            "beam_size": self.config.settings.beam_size,
            "signatures": self.evaluator.signatures,
        }
        record = self.files.read_json(TEACHER)
        if record is not None and all(record.get(name) == value for name, value in key.items()):
            measurement = self.files.read_measurement(TEACHER)
            hypotheses = read_hypotheses(self.files.hypotheses_path(TEACHER))
        else:
            hypotheses, measurement, timing = self._measure(translate)
            if measurement.failures:
                name, reason = next(iter(measurement.failures.items()))
                raise CorpusError(f"validation metric {name} cannot be computed on the teacher's output: {reason}")
            record = {**key, **self._describe(measurement), **timing, "extra": measure_extra()}
            self.files.write(TEACHER, record, hypotheses, measurement)
        self.teacher, self.teacher_hypotheses = measurement, hypotheses
        self.teacher_extra = _known(record.get("extra", {}))
        self.detector = self._build_detector()
        return record

    # --------------------------------------------------------------------------------------------- validation

    def validate(
        self, step: int, attempt: int, translate: Translate, extra: Mapping[str, Any] | None = None
    ) -> ValidationResult:
        """Decode the set, score it, compare it with previous, best and teacher, judge it, and write the record."""
        return self.conclude(step, attempt, *self._measure(translate), extra)

    def translate(self, translate: Translate) -> tuple[list[str], dict[str, Any]]:
        """The hypotheses, and how long they took."""
        began = time.perf_counter()
        hypotheses = translate(self.sources)
        seconds = time.perf_counter() - began
        if len(hypotheses) != len(self.sources):
            raise ValueError(f"{len(self.sources)} sources were translated into {len(hypotheses)} hypotheses")
        num_tokens = self.count_tokens(hypotheses) if self.count_tokens else None
        speed = num_tokens / seconds if num_tokens is not None else None
        return hypotheses, {"decode_seconds": seconds, "decode_tokens_per_second": speed}

    def score(self, hypotheses: list[str]) -> tuple[QualityMeasurement, float]:
        """Their measurement, made here and now, and the seconds that it took."""
        began = time.perf_counter()
        measurement = self.evaluator.evaluate(self.sources, hypotheses, self.references)
        return measurement, time.perf_counter() - began

    def conclude(
        self,
        step: int,
        attempt: int,
        hypotheses: list[str],
        measurement: QualityMeasurement,
        timing: dict[str, Any],
        extra: Mapping[str, Any] | None = None,
    ) -> ValidationResult:
        """Compare what was measured at a step with previous, best and teacher, judge it, and write the record."""
        comparisons = self._compare(measurement, extra or {})
        verdict = self.detector.judge(measurement, step, attempt)
        result = self._build_result(step, attempt, hypotheses, measurement, verdict, extra, timing, comparisons)
        self.files.write(validation_stem(step, attempt), result.to_json(), hypotheses, measurement)
        self._remember(measurement, step, attempt, result.error_analysis["error_counts"])
        return result

    def observe(
        self, step: int, attempt: int, translate: Translate, extra: Mapping[str, Any] | None = None
    ) -> ValidationResult:
        """As `validate`, for the record alone: kept in a folder of its own, judged, and then forgotten."""
        hypotheses, measurement, timing = self._measure(translate)
        best_at = self.detector.best_at
        verdict = self.detector.compare(measurement, self.detector.best, best_at[0] if best_at else None)
        result = self._build_result(step, attempt, hypotheses, measurement, verdict, extra, timing)
        self.asked_files.write(validation_stem(step, attempt), result.to_json(), hypotheses, measurement)
        return result

    def start_width(self) -> None:
        """Look for a new best from now on, since the model is deployed with other bits; remember the old one."""
        self._reference, self._reference_at = self.detector.best, self.detector.best_at
        self.detector.start_new_best()

    def is_held(self, measurement: QualityMeasurement) -> bool:
        """Whether the drop from the best of the width before, if there was one, is within the margin."""
        if self._reference is None:
            return True
        verdict = self.detector.compare(measurement, self._reference)
        return verdict.drop is not None and verdict.drop <= verdict.margin

    def write_best_report(self, result: ValidationResult) -> Path:
        """Write best_model_validation_report.txt about this result."""
        write_text(self.files.report_path, format_best_report(result, self.detector))
        return self.files.report_path

    # -------------------------------------------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Any]:
        """Plain data; the arrays are read again from the validation files."""
        return {
            "set_sha256": self.set_sha256,
            "previous_at": list(self._previous_at) if self._previous_at else None,
            "reference_at": list(self._reference_at) if self._reference_at else None,
            "detector": self.detector.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore after `score_teacher`; RunFolderError when a validation that is still needed is gone."""
        self.detector.load_state_dict(state["detector"], self._load_measurement)
        self._reference_at, self._reference = None, None
        if state["reference_at"] is not None:
            step, attempt = (int(number) for number in state["reference_at"])
            self._reference_at, self._reference = (step, attempt), self._load_measurement(step, attempt)
        self._previous_at, self._previous, self._previous_counts = None, None, None
        if state["previous_at"] is not None:
            step, attempt = (int(number) for number in state["previous_at"])
            record = self.files.read_json(validation_stem(step, attempt)) or {}
            counts = record.get("error_analysis", {}).get("error_counts", {})
            self._remember(self._load_measurement(step, attempt), step, attempt, counts)

    # ---------------------------------------------------------------------------------------------- internals

    def _build_result(
        self,
        step: int,
        attempt: int,
        hypotheses: list[str],
        measurement: QualityMeasurement,
        verdict: Verdict,
        extra: Mapping[str, Any] | None,
        timing: dict[str, Any],
        comparisons: dict[str, dict[str, Any]] | None = None,
    ) -> ValidationResult:
        """`comparisons` are those made before the verdict, which may have changed the best; default: made now."""
        analysis = analyse_errors(
            self.metrics, measurement, self.sources, hypotheses, self.references,
            self.teacher, self.teacher_hypotheses, self._previous_counts,
        )  # fmt: skip
        return ValidationResult(
            step=step,
            attempt=attempt,
            teacher_scores=dict(self.teacher.scores) if self.teacher else {},
            retentions=self.detector.scale.retentions(measurement.scores),
            quality_score=verdict.quality_score,
            verdict=verdict,
            comparisons=self._compare(measurement, extra or {}) if comparisons is None else comparisons,
            error_analysis=analysis,
            extra=dict(extra or {}),
            measurement=measurement,
            **self._describe(measurement),
            **timing,
        )

    def _build_detector(self) -> QualityDegradationDetector:
        teacher_scores = self.teacher.scores if self.teacher else None
        scale = build_quality_scale(self.evaluator.metrics, self.config.settings.weights, teacher_scores)
        return QualityDegradationDetector(self.config, scale, self.set_sha256, len(self.references), self.teacher)

    def _load_measurement(self, step: int, attempt: int) -> QualityMeasurement:
        return self.files.read_measurement(validation_stem(step, attempt))

    def _remember(self, measurement: QualityMeasurement, step: int, attempt: int, counts: Mapping[str, int]) -> None:
        self._previous, self._previous_at, self._previous_counts = measurement, (step, attempt), dict(counts)

    def _measure(self, translate: Translate) -> tuple[list[str], QualityMeasurement, dict[str, Any]]:
        """Hypotheses, their measurement, and how long both took."""
        hypotheses, timing = self.translate(translate)
        measurement, seconds = self.score(hypotheses)
        return hypotheses, measurement, timing | {"score_seconds": seconds}

    def _describe(self, measurement: QualityMeasurement) -> dict[str, Any]:
        """The plain-data part of a measurement, with 95 % intervals of the scores."""
        return {
            "set_sha256": measurement.set_sha256,
            "num_sentences": measurement.num_sentences,
            "scores": measurement.scores,
            "intervals": {
                name: confidence_interval(draws) for name, draws in self.detector.draw_scores(measurement).items()
            },
            "signatures": measurement.signatures,
            "probes": measurement.probe_counts,
            "failures": measurement.failures,
            "length_ratio": measurement.length_ratio,
        }

    def _compare(self, measurement: QualityMeasurement, extra: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """Paired comparisons with previous, best and teacher, for each that was measured on the same set."""
        best_at = self.detector.best_at
        others: dict[str, tuple[QualityMeasurement | None, tuple[int, int] | None]] = {
            "previous": (self._previous, self._previous_at),
            "best": (self.detector.best, best_at),
            "teacher": (self.teacher, None),
        }
        comparisons: dict[str, dict[str, Any]] = {}
        for label, (other, at) in others.items():
            if other is None or other.set_sha256 != measurement.set_sha256:
                continue
            comparisons[label] = {
                "step": at[0] if at else None,
                "attempt": at[1] if at else None,
                "metrics": compare_scores(measurement, other, self.detector),
                "extra": _compare_extra(extra, self._find_extra(at)),
            }
        return comparisons

    def _find_extra(self, at: tuple[int, int] | None) -> dict[str, Any]:
        """What was measured beside the text at a step and attempt; None stands for the teacher."""
        if at is None:
            return self.teacher_extra
        return _known((self.files.read_json(validation_stem(*at)) or {}).get("extra", {}))


def _known(extra: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in extra.items() if value is not None}


def _compare_extra(new: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """New minus other of every figure beside the text that both have."""
    return {
        name: {"score": new[name], "other_score": other[name], "difference": new[name] - other[name]}
        for name in new
        if name in other
    }


def compare_scores(
    new: QualityMeasurement, other: QualityMeasurement, detector: QualityDegradationDetector
) -> dict[str, dict[str, Any]]:
    """Paired bootstrap of each metric both have: new minus other, on the metric's own scale."""
    draws_new, draws_other = detector.draw_scores(new), detector.draw_scores(other)
    compared = {}
    for name in new.scores:
        if name in draws_new and name in draws_other:
            difference = new.scores[name] - other.scores[name]
            draws = draws_new[name] - draws_other[name]
            compared[name] = {
                "score": new.scores[name],
                "other_score": other.scores[name],
                "difference": difference,
                "interval": list(confidence_interval(draws)),
                "p_value": paired_p_value(difference, draws),
            }
    return compared
