"""The quality score Q: how much of the teacher's quality a model keeps, as one number.

Retention of a metric is model/teacher on the same sentences, each on the scale where 0 is worthless. Q is the weighted
mean of the retentions. A metric on which the teacher itself scores under 0.1 is left out; which ones count is fixed
when the scale is built. Q = 1 is the teacher's quality; it is never clipped from above.

Without a teacher (while the teacher itself is trained) the same mean is taken of the values themselves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from cvm_translator.errors import ConfigError
from cvm_translator.metrics import ROUGE_TYPES, Metric
from cvm_translator.metrics.base import FloatArray, check_finite
from cvm_translator.metrics.resampling import CountArray, resample

MIN_TEACHER_VALUE = 0.1
MIN_DENOMINATOR = 1e-3  # keeps one odd draw of a tiny set from dividing by 0; far below MIN_TEACHER_VALUE


def spread_weights(weights: Mapping[str, float]) -> dict[str, float]:
    """Weights by score name: that of `rouge` is shared equally by its three scores."""
    spread = {name: weight for name, weight in weights.items() if name != "rouge"}
    spread.update({name: weights["rouge"] / len(ROUGE_TYPES) for name in ROUGE_TYPES if "rouge" in weights})
    return spread


@dataclass(frozen=True)
class QualityScale:
    """Which metrics count, with which weight, against which teacher. Build with `build_quality_scale`."""

    metrics: dict[str, Metric]
    weights: dict[str, float]
    """Of the metrics that count."""
    teacher_values: dict[str, float] | None
    """The teacher's retention values; None when there is no teacher to compare with."""
    left_out: list[str] = field(default_factory=list)
    """Weighted metrics that do not count because the teacher scores under 0.1 on them."""

    def values(self, scores: Mapping[str, FloatArray | float]) -> dict[str, FloatArray]:
        """Retention values of scores (or of arrays of scores), for every metric known."""
        return {
            name: self.metrics[name].retention_value(np.asarray(score, dtype=np.float64))
            for name, score in scores.items()
            if name in self.metrics
        }

    def retentions(self, scores: Mapping[str, float]) -> dict[str, float]:
        """Model/teacher for every metric on which the teacher is worth comparing with, weighted or not."""
        if self.teacher_values is None:
            return {}
        return {
            name: float(value) / self.teacher_values[name]
            for name, value in self.values(scores).items()
            if self.teacher_values.get(name, 0.0) >= MIN_TEACHER_VALUE
        }

    def quality(
        self,
        scores: Mapping[str, FloatArray | float],
        teacher_scores: Mapping[str, FloatArray | float] | None = None,
    ) -> FloatArray:
        """Q of scores (...). `teacher_scores` (...): the teacher's own under the same draws; default its fixed ones.

        Raises KeyError when a metric that counts has no score.
        """
        values = self.values(scores)
        teacher: Mapping[str, FloatArray | float] | None = self.teacher_values
        if teacher_scores is not None and self.teacher_values is not None:
            teacher = self.values(teacher_scores)
        total = sum(
            weight * values[name] / (1.0 if teacher is None else np.maximum(teacher[name], MIN_DENOMINATOR))
            for name, weight in self.weights.items()
        )
        return np.asarray(total / sum(self.weights.values()), dtype=np.float64)


def build_quality_scale(
    metrics: Sequence[Metric], weights: Mapping[str, float], teacher_scores: Mapping[str, float] | None
) -> QualityScale:
    """Fix which metrics count. Refuses weights that leave nothing to judge by."""
    by_name = {metric.name: metric for metric in metrics}
    wanted = {name: weight for name, weight in spread_weights(weights).items() if weight > 0 and name in by_name}
    teacher_values = None
    left_out: list[str] = []
    if teacher_scores is not None:
        missing = [name for name in by_name if name not in teacher_scores]
        if missing:
            raise ValueError(f"the teacher has no score for {', '.join(missing)}")
        teacher_values = {name: float(by_name[name].retention_value(teacher_scores[name])) for name in by_name}  # type: ignore[arg-type]
        left_out = [name for name in wanted if teacher_values[name] < MIN_TEACHER_VALUE]
    counting = {name: weight for name, weight in wanted.items() if name not in left_out}
    if not counting:
        reason = f"the teacher scores under {MIN_TEACHER_VALUE} on all of {', '.join(left_out)}" if left_out else "none"
        raise ConfigError(
            f"validation.weights {dict(weights)} leave no metric to judge by ({reason}): "
            "use a better teacher or weigh another measured metric"
        )
    return QualityScale(by_name, counting, teacher_values, left_out)


def draw_scores(
    metrics: Mapping[str, Metric], counts: CountArray, statistics: Mapping[str, FloatArray]
) -> tuple[dict[str, FloatArray], dict[str, str]]:
    """Scores (draws,) of every metric under every resampled corpus, in one matrix product; and why one has none."""
    names = [name for name in statistics if name in metrics]
    sums = resample(counts, np.concatenate([statistics[name] for name in names], axis=1))  # (draws, sum of K)
    edges = np.cumsum([statistics[name].shape[1] for name in names])[:-1]
    scores, failures = {}, {}
    for name, part in zip(names, np.split(sums, edges, axis=1), strict=True):
        try:
            scores[name] = check_finite(name, metrics[name].score(part), "resampling")
        except Exception as error:  # whatever a library throws, as in `evaluate`
            failures[name] = f"{type(error).__name__}: {error}"
    return scores, failures
