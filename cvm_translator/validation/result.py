"""What one validation found, as it is kept in `validation/step_<step>.json`."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from cvm_translator.validation.detector import Verdict
from cvm_translator.validation.evaluator import QualityMeasurement

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class ValidationResult:
    """Plain data, but for `measurement`, whose arrays lie in the statistics file."""

    step: int
    attempt: int
    set_sha256: str
    num_sentences: int
    scores: dict[str, float]
    """0..100, but for bertscore and comet, whose perfect score is 1."""
    intervals: dict[str, tuple[float, float]]
    """95 % intervals of the scores."""
    teacher_scores: dict[str, float]
    retentions: dict[str, float]
    """Student/teacher on the retention scale, of every metric on which the teacher is worth comparing with."""
    quality_score: float | None
    """None when a metric that counts could not be computed."""
    verdict: Verdict
    comparisons: dict[str, dict[str, Any]]
    """With `previous`, `best` (before this one) and `teacher`: differences of the scores, with interval and p-value,
    and of `extra`."""
    probes: dict[str, int]
    error_analysis: dict[str, Any]
    signatures: dict[str, str]
    failures: dict[str, str]
    """Metrics that could not be computed, with the reason."""
    length_ratio: float
    decode_seconds: float
    score_seconds: float
    decode_tokens_per_second: float | None
    extra: dict[str, Any] = field(default_factory=dict)
    """What the caller measured beside the text: perplexity, float against int8, ..."""
    measurement: QualityMeasurement | None = field(default=None, repr=False, compare=False)

    @property
    def seconds(self) -> float:
        return self.decode_seconds + self.score_seconds

    def to_json(self) -> dict[str, Any]:
        data = {entry.name: getattr(self, entry.name) for entry in fields(self) if entry.name != "measurement"}
        data["verdict"] = self.verdict.to_json()
        return {"schema_version": SCHEMA_VERSION, **data}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> ValidationResult:
        if data.get("schema_version") != SCHEMA_VERSION:
            raise ValueError(f"validation record has schema version {data.get('schema_version')}, not {SCHEMA_VERSION}")
        known = {entry.name for entry in fields(cls)}
        values = {name: value for name, value in data.items() if name in known}
        values["verdict"] = Verdict.from_json(data["verdict"])
        values["intervals"] = {name: (low, high) for name, (low, high) in data["intervals"].items()}
        return cls(**values)
