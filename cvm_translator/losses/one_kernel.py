"""The gradient of the distillation loss written over a chunk's logits in one kernel.

Each row of logits is read twice, and the second time mostly from the cache: once for what its softmaxes are divided by,
once for the gradient (reverse KL and Jensen-Shannon, whose gradients hold the row's divergence, read it once more).
PyTorch's operators, and what its compiler makes of them, read and write tensors of the same size several times.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_DIVERGENCES = {"forward_kl": 1, "reverse_kl": 2, "js": 3}
_BLOCK = 4096
_NUM_WARPS = 8


@triton.jit
def _add_block(best, total, values):  # type: ignore[no-untyped-def]
    """The largest value and Σ exp(value − largest), with a block more."""
    larger = tl.maximum(best, tl.max(values, 0))
    return larger, total * tl.exp(best - larger) + tl.sum(tl.exp(values - larger), 0)


@triton.jit
def _log_add_exp(left, right):  # type: ignore[no-untyped-def]
    larger = tl.maximum(left, right)
    return larger + tl.log(1.0 + tl.exp(tl.minimum(left, right) - larger))


@triton.jit
def _write_gradient(  # type: ignore[no-untyped-def]
    logits,
    teacher,
    targets,
    sums,
    inverse_temperature,
    distillation_weight,
    beta,
    smoothing,
    NUM_CLASSES: tl.constexpr,
    DIVERGENCE: tl.constexpr,
    IS_TEMPERED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row: (V,) logits become the gradient; (3,) divergence, cross-entropy and whether the target is the best."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * NUM_CLASSES
    teacher += row * NUM_CLASSES
    target = tl.load(targets + row)
    target_logit = tl.load(logits + target).to(tl.float32)
    # ------------------------------------------------------------------------------------- what softmaxes divide by
    best, total, logit_sum = -float("inf"), 0.0, 0.0
    best_tempered, total_tempered = -float("inf"), 0.0
    best_teacher, total_teacher = -float("inf"), 0.0
    for start in range(0, NUM_CLASSES, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        is_inside = columns < NUM_CLASSES
        z = tl.load(logits + columns, mask=is_inside, other=-float("inf")).to(tl.float32)
        logit_sum += tl.sum(tl.where(is_inside, z, 0.0), 0)
        best, total = _add_block(best, total, z)
        if DIVERGENCE != 0:
            if IS_TEMPERED:
                best_tempered, total_tempered = _add_block(best_tempered, total_tempered, z * inverse_temperature)
            t = tl.load(teacher + columns, mask=is_inside, other=-float("inf")).to(tl.float32)
            best_teacher, total_teacher = _add_block(best_teacher, total_teacher, t)
    log_sum = best + tl.log(total)
    log_sum_tempered = log_sum
    if IS_TEMPERED:
        log_sum_tempered = best_tempered + tl.log(total_tempered)
    log_sum_teacher = best_teacher + tl.log(total_teacher)
    # -------------------------------------------------------------------- the divergence, where gradients depend on it
    divergence = 0.0
    own_divergence = 0.0
    if DIVERGENCE >= 2:
        for start in range(0, NUM_CLASSES, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            is_inside = columns < NUM_CLASSES
            z = tl.load(logits + columns, mask=is_inside, other=0.0).to(tl.float32)
            t = tl.load(teacher + columns, mask=is_inside, other=0.0).to(tl.float32)
            q, p = z * inverse_temperature - log_sum_tempered, t - log_sum_teacher
            other = p
            if DIVERGENCE == 3:
                other = _log_add_exp(q, p) - 0.6931471805599453
                divergence += tl.sum(tl.where(is_inside, tl.exp(p) * (p - other), 0.0), 0)
            own_divergence += tl.sum(tl.where(is_inside, tl.exp(q) * (q - other), 0.0), 0)
        divergence += own_divergence
        if DIVERGENCE == 3:
            divergence *= 0.5
    # --------------------------------------------------------------------------------------------------- the gradient
    for start in range(0, NUM_CLASSES, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        is_inside = columns < NUM_CLASSES
        z = tl.load(logits + columns, mask=is_inside, other=0.0).to(tl.float32)
        wanted = smoothing / NUM_CLASSES + tl.where(columns == target, 1.0 - smoothing, 0.0)
        gradient = beta * (tl.exp(z - log_sum) - wanted)
        if DIVERGENCE != 0:
            t = tl.load(teacher + columns, mask=is_inside, other=0.0).to(tl.float32)
            q, p = z * inverse_temperature - log_sum_tempered, t - log_sum_teacher
            if DIVERGENCE == 1:
                divergence += tl.sum(tl.where(is_inside, tl.exp(p) * (p - q), 0.0), 0)
                difference = tl.exp(q) - tl.exp(p)
            elif DIVERGENCE == 2:
                difference = tl.exp(q) * (q - p - own_divergence)
            else:
                difference = 0.5 * tl.exp(q) * (q - _log_add_exp(q, p) + 0.6931471805599453 - own_divergence)
            gradient += distillation_weight * difference
        tl.store(logits + columns, gradient.to(logits.dtype.element_ty), mask=is_inside)
    task = log_sum - (1.0 - smoothing) * target_logit - smoothing / NUM_CLASSES * logit_sum
    tl.store(sums + 3 * row, divergence)
    tl.store(sums + 3 * row + 1, task)
    tl.store(sums + 3 * row + 2, (target_logit >= best).to(tl.float32))


def write_gradient(
    logits: Tensor,
    targets: Tensor,
    teacher: Tensor | None,
    *,
    divergence: str,
    temperature: float,
    alpha: float,
    beta: float,
    smoothing: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `DistillationLoss.write_gradient`, of logits (N, V) and tempered ones of the teacher in rows without gaps."""
    num_rows, num_classes = logits.shape
    sums = torch.empty((num_rows, 3), dtype=torch.float32, device=logits.device)
    if not (logits.is_contiguous() and (teacher is None or teacher.is_contiguous())):
        raise ValueError("the rows of the logits must follow each other without gaps")
    launch: Any = _write_gradient[(num_rows,)]
    launch(
        logits,
        logits if teacher is None else teacher,
        targets,
        sums,
        1.0 / temperature,
        float(alpha * temperature),
        float(beta),
        float(smoothing),
        NUM_CLASSES=num_classes,
        DIVERGENCE=0 if teacher is None else _DIVERGENCES[divergence],
        IS_TEMPERED=temperature != 1.0,
        BLOCK=_BLOCK,
        num_warps=_NUM_WARPS,
    )
    distillation, task, num_correct = sums.sum(0)
    return distillation * temperature**2, task, num_correct.long()
