"""What is checked before the student trains: is the teacher worth copying, do both loss terms pull, is there room?

Warnings go into the events and the report; what would make the run worthless is an error.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from cvm_translator.config import RunConfig
from cvm_translator.corpus.dataset import Batch, DistillationDataset
from cvm_translator.losses.distillation import DistillationLoss, GradientBalance, compute_gradient_ratio
from cvm_translator.models.transformer import CvmTransformer
from cvm_translator.pipeline.context import RunContext
from cvm_translator.training.objectives import find_real_targets
from cvm_translator.validation.preflight import check_disk, check_loss_balance, check_teacher

BALANCE_SENTENCES = 128
BYTES_PER_PARAMETER_SAVED = 12
"""Weights and two moments of AdamW, 4 bytes each."""


def needed_disk_bytes(num_parameters: int, num_kept: int, *, has_average: bool) -> int:
    """Room for the kept checkpoints, one being written, and the deliverables, with a tenth to spare."""
    per_checkpoint = num_parameters * (BYTES_PER_PARAMETER_SAVED + (4 if has_average else 0))
    return int(1.1 * (per_checkpoint * (num_kept + 3) + 6 * num_parameters)) + 50 * 2**20


def needed_run_bytes(config: RunConfig, student: CvmTransformer) -> int:
    """Room for what the distillation of this student writes."""
    has_average = config.distillation.ema_decay > 0
    return needed_disk_bytes(student.num_parameters(), config.keep_checkpoints, has_average=has_average)


def check_room(context: RunContext, checkpoints: Path, needed_bytes: int) -> None:
    """Ask for the room that a training needs before its first step; one that has checkpoints pauses for want of it."""
    if next(checkpoints.glob("checkpoint_*"), None) is None:
        check_disk(context.layout.root, needed_bytes)


def run_preflight(
    context: RunContext,
    student: CvmTransformer,
    teacher: CvmTransformer,
    loss: DistillationLoss,
    dataset: DistillationDataset,
    teacher_scores: dict[str, float],
    more_bytes: int = 0,
) -> dict[str, Any]:
    """Check and report; returns the figures for the final report. `more_bytes`: what else will be written there."""
    settings = context.config.distillation
    needed = needed_run_bytes(context.config, student) + more_bytes
    check_room(context, context.layout.checkpoints, needed)
    warnings = check_teacher(teacher_scores, teacher.num_parameters(), student.num_parameters())
    figures: dict[str, Any] = {"needed_disk_bytes": needed}
    if settings.alpha > 0:
        batch = dataset.batch(np.arange(min(BALANCE_SENTENCES, len(dataset)))).to(context.device)
        balance = measure_loss_balance(student, teacher, loss, batch)
        figures |= balance._asdict()
        if settings.beta > 0:
            warnings += check_loss_balance(
                balance.effective_targets, student.vocab_size, balance.gradient_ratio, settings.temperature
            )
    for warning in warnings:
        context.warn(warning.code, warning.message)
    figures["warnings"] = [warning.message for warning in warnings]
    return figures


@torch.no_grad()
def measure_loss_balance(
    student: CvmTransformer, teacher: CvmTransformer, loss: DistillationLoss, batch: Batch
) -> GradientBalance:
    """Both terms' gradients on one batch with the student as it begins, without dropout."""
    real = find_real_targets(batch)
    was_training = student.training
    hidden, matrix = student.eval()(batch.src, batch.src_mask, batch.tgt_in)
    teacher_hidden, teacher_matrix = teacher.eval()(batch.src, batch.src_mask, batch.tgt_in)
    student.train(was_training)
    selected, teacher_selected = (states.flatten(0, 1)[real] for states in (hidden, teacher_hidden))
    targets = batch.tgt_out.flatten()[real]
    return compute_gradient_ratio(loss, selected, matrix, targets, teacher_selected, teacher_matrix)


def describe_preflight(figures: dict[str, Any]) -> str:
    """The figures in one line, for the log and the terminal."""
    parts = [f"smallest drop found with 99 % power {figures['smallest_detectable_drop']:.1%}"]
    if "gradient_ratio" in figures:
        parts.insert(0, f"distillation gradient {figures['gradient_ratio']:.2f} of the task's")
        parts.insert(0, f"effective targets {figures['effective_targets']:.1f}")
    return "pre-flight: " + ", ".join(parts)
