"""Scoring of translations: every configured metric, exact match, and the degeneration probes.

Guarantees: one `QualityMeasurement` holds per-sentence statistics beside the scores, so that nothing downstream scores
again. Missing libraries are refused when the evaluator is built. A metric that crashes or gives NaN has no score and is
named in `failures`; it never gets a stand-in.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from cvm_translator.errors import MissingDependencyError
from cvm_translator.metrics import Metric, MetricOptions, build_metrics
from cvm_translator.metrics.base import FloatArray, check_finite
from cvm_translator.metrics.probes import PROBES, BoolArray, can_identify
from cvm_translator.validation.config import ValidationConfig

COLLAPSE_PROBES = ("empty", "repetition", "copy")


def compute_set_sha256(sources: Sequence[str], references: Sequence[str]) -> str:
    """Hash of a validation set: every pair, in order."""
    digest = hashlib.sha256()
    for source, reference in zip(sources, references, strict=True):
        for text in (source, reference):
            data = text.encode("utf-8", "surrogatepass")
            digest.update(len(data).to_bytes(8, "big") + data)
    return digest.hexdigest()


@dataclass(frozen=True)
class QualityMeasurement:
    """What was measured on one set of hypotheses. Arrays have one row a sentence."""

    set_sha256: str
    num_sentences: int
    scores: dict[str, float]
    statistics: dict[str, FloatArray] = field(repr=False)
    probes: dict[str, BoolArray] = field(repr=False)
    length_ratio: float
    """Characters of all hypotheses to characters of all references."""
    signatures: dict[str, str] = field(default_factory=dict, repr=False)
    failures: dict[str, str] = field(default_factory=dict)
    """Metrics without a score, with the reason."""

    @property
    def probe_counts(self) -> dict[str, int]:
        return {name: int(mask.sum()) for name, mask in self.probes.items()}

    @property
    def collapsed_share(self) -> float:
        """Share of sentences that are empty, a repetition loop or a copy of the source."""
        masks = [self.probes[name] for name in COLLAPSE_PROBES if name in self.probes]
        return float(np.logical_or.reduce(masks).mean()) if masks else 0.0


class TranslationQualityEvaluator:
    """Scores hypotheses against references. Keeps encoders and references' statistics between calls."""

    def __init__(self, config: ValidationConfig) -> None:
        settings = config.settings
        self.config = config
        options = MetricOptions(
            target_language=config.target_language,
            bertscore_model=settings.bertscore_model,
            bertscore_layer=settings.bertscore_layer,
            comet_model=settings.comet_model,
            device=config.device,
        )
        self.metrics: list[Metric] = build_metrics([*settings.metrics, "exact_match"], options)
        self.probe_names = [name for name in PROBES if name != "wrong_language" or can_identify(config.target_language)]

    @property
    def signatures(self) -> dict[str, str]:
        return {metric.name: metric.signature() for metric in self.metrics}

    def evaluate(
        self, sources: Sequence[str], hypotheses: Sequence[str], references: Sequence[str]
    ) -> QualityMeasurement:
        """Measure N hypotheses; lists of unequal length are refused with ValueError."""
        if not len(sources) == len(hypotheses) == len(references):
            raise ValueError(
                f"{len(sources)} sources, {len(hypotheses)} hypotheses and {len(references)} references do not match"
            )
        scores: dict[str, float] = {}
        statistics: dict[str, FloatArray] = {}
        failures: dict[str, str] = {}
        for metric in self.metrics:
            try:
                rows = check_finite(metric.name, metric.statistics(hypotheses, references, sources))
                score = float(metric.score(rows.sum(axis=0)))
                if not np.isfinite(score):
                    raise ValueError(f"{metric.name} is {score}")
            except MissingDependencyError:
                raise
            except Exception as error:  # whatever a library throws: no score, no decision, and the reason is told
                failures[metric.name] = f"{type(error).__name__}: {error}"
                continue
            scores[metric.name], statistics[metric.name] = score, rows
        language = self.config.target_language
        return QualityMeasurement(
            set_sha256=compute_set_sha256(sources, references),
            num_sentences=len(references),
            scores=scores,
            statistics=statistics,
            probes={name: PROBES[name](sources, hypotheses, references, language) for name in self.probe_names},
            length_ratio=sum(map(len, hypotheses)) / max(1, sum(map(len, references))),
            signatures=self.signatures,
            failures=failures,
        )
