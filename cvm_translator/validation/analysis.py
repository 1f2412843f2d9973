"""Error analysis of one validation: where the model is weak, and what changed since the last time.

Reads only measurements already made; scores nothing again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cvm_translator.metrics import Metric
from cvm_translator.metrics.base import FloatArray
from cvm_translator.metrics.probes import MAX_LENGTH_RATIO, BoolArray, length_ratios
from cvm_translator.validation.evaluator import QualityMeasurement

LENGTH_BUCKETS = ((1, 3), (4, 8), (9, 15), (16, 30), (31, None))
"""Words of the source, both ends included."""
NUM_WORST = 10
WORSE_BY_CHRF = 10.0


def bucket_name(bucket: tuple[int, int | None]) -> str:
    low, high = bucket
    return f"{low}-{high} words" if high is not None else f"{low} words and more"


def compute_scores_by_length(
    metrics: Mapping[str, Metric], measurement: QualityMeasurement, sources: Sequence[str]
) -> list[dict[str, Any]]:
    """Scores of each bucket of source length that holds sentences."""
    words = np.array([max(1, len(source.split())) for source in sources])
    rows = []
    for bucket in LENGTH_BUCKETS:
        mask = (words >= bucket[0]) & (words <= (bucket[1] or np.inf))
        if mask.any():
            scores = {
                name: float(metrics[name].score(rows_of_metric[mask].sum(axis=0)))
                for name, rows_of_metric in measurement.statistics.items()
            }
            rows.append({"bucket": bucket_name(bucket), "num_sentences": int(mask.sum()), "scores": scores})
    return rows


def sentence_scores(metrics: Mapping[str, Metric], measurement: QualityMeasurement, name: str = "chrf") -> FloatArray:
    """A metric's score of each sentence (N,)."""
    return metrics[name].score(measurement.statistics[name])


def error_masks(
    measurement: QualityMeasurement,
    hypotheses: Sequence[str],
    references: Sequence[str],
    chrf: FloatArray | None = None,
    teacher_hypotheses: Sequence[str] | None = None,
    teacher_chrf: FloatArray | None = None,
) -> dict[str, BoolArray]:
    """Error categories: the probes, too short, too long, and the differences from the teacher."""
    masks = {name: mask for name, mask in measurement.probes.items() if name != "length_ratio"}
    ratios = length_ratios(hypotheses, references)
    empty = np.array([not hypothesis.strip() for hypothesis in hypotheses], dtype=np.bool_)
    masks["under_translation"] = (ratios < 1.0 / MAX_LENGTH_RATIO) & ~empty
    masks["over_translation"] = ratios > MAX_LENGTH_RATIO
    if teacher_hypotheses is not None:
        masks["differs_from_teacher"] = np.array(
            [mine.strip() != theirs.strip() for mine, theirs in zip(hypotheses, teacher_hypotheses, strict=True)]
        )
    if chrf is not None and teacher_chrf is not None:
        masks["much_worse_than_teacher"] = chrf < teacher_chrf - WORSE_BY_CHRF
    return masks


def _describe(
    index: int,
    sources: Sequence[str],
    hypotheses: Sequence[str],
    references: Sequence[str],
    chrf: FloatArray,
    teacher_hypotheses: Sequence[str] | None,
    teacher_chrf: FloatArray | None,
    masks: Mapping[str, BoolArray],
) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "sentence": index + 1,
        "source": sources[index],
        "reference": references[index],
        "student": hypotheses[index],
        "chrf": round(float(chrf[index]), 2),
        "errors": [name for name, mask in masks.items() if mask[index] and name != "differs_from_teacher"],
    }
    if teacher_hypotheses is not None and teacher_chrf is not None:
        entry.update(teacher=teacher_hypotheses[index], teacher_chrf=round(float(teacher_chrf[index]), 2))
    return entry


def analyse_errors(
    metrics: Mapping[str, Metric],
    measurement: QualityMeasurement,
    sources: Sequence[str],
    hypotheses: Sequence[str],
    references: Sequence[str],
    teacher: QualityMeasurement | None = None,
    teacher_hypotheses: Sequence[str] | None = None,
    previous_counts: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """Plain data: scores by source length, error-category counts and their change, worst sentences, largest losses.

    `worst_sentences` have the lowest chrF; `largest_losses` the largest loss of chrF against the teacher.
    """
    by_length = compute_scores_by_length(metrics, measurement, sources)
    if "chrf" not in measurement.statistics:
        return {"scores_by_length": by_length, "error_counts": measurement.probe_counts}
    chrf = sentence_scores(metrics, measurement)
    teacher_chrf = None
    if teacher is not None and "chrf" in teacher.statistics:
        teacher_chrf = sentence_scores(metrics, teacher)
        for mine, theirs in zip(by_length, compute_scores_by_length(metrics, teacher, sources), strict=True):
            mine["teacher_scores"] = theirs["scores"]
    masks = error_masks(measurement, hypotheses, references, chrf, teacher_hypotheses, teacher_chrf)
    counts = {name: int(mask.sum()) for name, mask in masks.items()}

    def describe(order: FloatArray, below: float = np.inf) -> list[dict[str, Any]]:
        chosen = [index for index in np.argsort(order, kind="stable")[:NUM_WORST] if order[index] < below]
        return [
            _describe(int(index), sources, hypotheses, references, chrf, teacher_hypotheses, teacher_chrf, masks)
            for index in chosen
        ]

    analysis: dict[str, Any] = {
        "scores_by_length": by_length,
        "error_counts": counts,
        "error_changes": {
            name: count - previous_counts[name] for name, count in counts.items() if name in (previous_counts or {})
        }
        if previous_counts
        else {},
        "worst_sentences": describe(chrf),
    }
    if teacher_chrf is not None:
        analysis["largest_losses"] = describe(chrf - teacher_chrf, below=0.0)
    return analysis
