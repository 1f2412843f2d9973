"""AdamW with weight decay on matrices only, and an optional moving average of the weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from cvm_translator.config.schema import TrainingConfig


def build_optimizer(model: nn.Module, settings: TrainingConfig) -> torch.optim.AdamW:
    """AdamW over all trainable parameters; biases and norms (one dimension) are not decayed."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        groups,
        lr=settings.learning_rate,
        betas=(settings.adam_beta1, settings.adam_beta2),
        eps=settings.adam_epsilon,
        fused=True,
    )


class MovingAverage:
    """Exponential moving average of a model's parameters: the weights that are validated and kept when it is on.

    The decay warms up as (1 + n) / (10 + n), so the first averages are not dominated by the initial weights.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.num_updates = 0
        self._model = model
        self.tensors = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}

    @torch.no_grad()
    def update(self) -> None:
        self.num_updates += 1
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        parameters = [parameter.detach() for parameter in self._model.parameters()]
        torch._foreach_lerp_(list(self.tensors.values()), parameters, 1.0 - decay)

    def load_tensors(self, tensors: dict[str, torch.Tensor], num_updates: int) -> None:
        assert tensors.keys() == self.tensors.keys()
        for name, tensor in tensors.items():
            self.tensors[name].copy_(tensor)
        self.num_updates = num_updates
