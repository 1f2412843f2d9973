"""Public names for distilling a model: `ModelDistiller(DistillationConfig(...)).run_distillation()`."""

from __future__ import annotations

from cvm_translator.config import DistillationConfig
from cvm_translator.corpus.dataset import DistillationDataset
from cvm_translator.losses.distillation import DistillationLoss
from cvm_translator.pipeline.distiller import ModelDistiller

__all__ = ["DistillationConfig", "DistillationDataset", "DistillationLoss", "ModelDistiller"]
