"""What the student is trained on."""

from cvm_translator.losses.distillation import (
    DistillationLoss,
    GradientBalance,
    LossParts,
    compute_gradient_ratio,
    compute_logits,
)

__all__ = ["DistillationLoss", "GradientBalance", "LossParts", "compute_gradient_ratio", "compute_logits"]
