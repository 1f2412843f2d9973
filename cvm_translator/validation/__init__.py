"""Validation of what a model actually outputs: scoring, the guard's verdicts, error analysis, pre-flight, the gate."""

from __future__ import annotations

from cvm_translator.validation.config import ValidationConfig
from cvm_translator.validation.detector import QualityDegradationDetector, Verdict
from cvm_translator.validation.evaluator import QualityMeasurement, TranslationQualityEvaluator
from cvm_translator.validation.result import ValidationResult
from cvm_translator.validation.validator import DistillationValidator

__all__ = [
    "DistillationValidator",
    "QualityDegradationDetector",
    "QualityMeasurement",
    "TranslationQualityEvaluator",
    "ValidationConfig",
    "ValidationResult",
    "Verdict",
]
