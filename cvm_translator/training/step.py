"""One optimizer step: forward, backward, the checks that come before the optimizer moves, and the move.

Guarantees: a loss or gradient that is not finite, or a loss that the spike window rejects, never reaches the weights,
the optimizer's moments or the window.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from cvm_translator.config.schema import FaultInjection, TrainingConfig
from cvm_translator.corpus.dataset import Batch
from cvm_translator.training.device import build_autocast
from cvm_translator.training.faults import corrupt_batch, corrupt_loss, corrupt_teacher, corrupt_weights
from cvm_translator.training.objectives import Objective
from cvm_translator.training.optimizer import MovingAverage
from cvm_translator.training.spikes import SpikeWindow


@dataclass(frozen=True)
class StepResult:
    """Means over the real target tokens of one effective batch."""

    loss: float
    distillation_loss: float
    task_loss: float
    accuracy: float
    """Share of target tokens that the teacher-forced student ranks first."""
    grad_norm: float
    """Before clipping; NaN when the loss itself was rejected."""
    num_tokens: int
    rejected: str | None
    """Why the optimizer did not move, if so."""


def train_step(
    model: nn.Module,
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    settings: TrainingConfig,
    spikes: SpikeWindow,
    *,
    learning_rate: float,
    average: MovingAverage | None = None,
    faults: list[FaultInjection] | None = None,
) -> StepResult:
    """Run one step on `batch`, cut into `settings.grad_accum_steps` micro-batches."""
    device = batch.src.device
    faults = faults or []
    corrupt_teacher(faults, objective)
    totals = torch.zeros(4, device=device)  # loss, distillation, task, correct
    # ------------------------------------------------------------------------------------------ forward and backward
    optimizer.zero_grad(set_to_none=True)
    for micro_batch in corrupt_batch(faults, batch).split(settings.grad_accum_steps):
        with build_autocast(settings.precision, device):
            parts = objective(micro_batch, batch.num_tokens)
        loss = corrupt_loss(faults, parts.total)
        loss.backward()  # type: ignore[no-untyped-call]
        totals += torch.stack(
            [loss.detach(), parts.distillation.detach(), parts.task.detach(), parts.num_correct.detach()]
        ).to(totals)
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    grad_norm_tensor = nn.utils.get_total_norm(gradients)
    # ------------------------------------------------------------------------------------------- the check and the move
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    is_masked = device.type == "cuda"
    if is_masked:  # the device judges as the host will, and goes on before it is asked
        is_admitted = totals[0].isfinite() & (totals[0].double() <= spikes.find_limit()) & grad_norm_tensor.isfinite()
        move_if_admitted(optimizer, is_admitted, grad_norm_tensor, settings.max_grad_norm)
    values = torch.cat([totals, grad_norm_tensor.detach().to(totals).reshape(1)]).tolist()  # the one sync point
    total, distillation, task, correct, grad_norm = values
    rejected = None
    if not (math.isfinite(total) and math.isfinite(grad_norm)):
        rejected = "loss is not finite" if not math.isfinite(total) else "gradient is not finite"
    elif not spikes.admits(total):
        rejected = "loss spike"
    if rejected is None:
        if not is_masked:
            if grad_norm > settings.max_grad_norm:  # else clipping multiplies all gradients by 1
                nn.utils.clip_grads_with_norm_(model.parameters(), settings.max_grad_norm, grad_norm_tensor)
            optimizer.step()
        corrupt_weights(faults, model)
        spikes.add(total)
        if average is not None:
            average.update()
    return StepResult(total, distillation, task, correct / batch.num_tokens, grad_norm, batch.num_tokens, rejected)


def move_if_admitted(
    optimizer: torch.optim.Optimizer, is_admitted: torch.Tensor, grad_norm: torch.Tensor, max_grad_norm: float
) -> None:
    """Clip and step, or do neither, as a bool on the device says.

    The optimizer's fused kernel divides the gradients by `grad_scale`, and leaves everything as it is where `found_inf`
    is not 0: so PyTorch's gradient scaler steers it.
    """
    scale = (grad_norm / max_grad_norm).clamp_min(1.0).float()
    optimizer.grad_scale, optimizer.found_inf = scale, (~is_admitted).float()  # type: ignore[attr-defined]
    try:
        optimizer.step()
    finally:
        del optimizer.grad_scale, optimizer.found_inf  # type: ignore[attr-defined]
