"""The stages of a run and the run itself."""

from __future__ import annotations

from cvm_translator.pipeline.distiller import ModelDistiller, run_pipeline
from cvm_translator.pipeline.scoring import validate_model

__all__ = ["ModelDistiller", "run_pipeline", "validate_model"]
