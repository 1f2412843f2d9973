"""Public names for validating a model's output and detecting degradation."""

from __future__ import annotations

from cvm_translator.validation import (
    DistillationValidator,
    QualityDegradationDetector,
    TranslationQualityEvaluator,
    ValidationConfig,
    ValidationResult,
)

__all__ = [
    "DistillationValidator",
    "QualityDegradationDetector",
    "TranslationQualityEvaluator",
    "ValidationConfig",
    "ValidationResult",
]
