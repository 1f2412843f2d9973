"""What the student is trained on."""

from cvm_translator.losses.distillation import (
    DistillationLoss,
    GradientBalance,
    LossParts,
    compute_gradient_ratio,
    compute_logits,
)
from cvm_translator.losses.top_targets import TopTargets, find_top_targets

__all__ = [
    "DistillationLoss",
    "GradientBalance",
    "LossParts",
    "TopTargets",
    "compute_gradient_ratio",
    "compute_logits",
    "find_top_targets",
]
