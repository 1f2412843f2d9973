"""Planted faults, for tests and benchmarks of the guard: a documented setting that the guard is told nothing about."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from torch import nn

from cvm_translator.config.schema import FaultInjection
from cvm_translator.corpus.dataset import Batch
from cvm_translator.training.objectives import DistillationObjective, Objective


def active_faults(faults: list[FaultInjection], executed_step: int) -> list[FaultInjection]:
    """The faults that hit the 1-based executed step."""
    return [
        fault
        for fault in faults
        if fault.from_step <= executed_step
        and (fault.num_steps is None or executed_step < fault.from_step + fault.num_steps)
    ]


def learning_rate_factor(faults: list[FaultInjection]) -> float:
    factor = 1.0
    for fault in faults:
        if fault.kind == "learning_rate":
            factor *= fault.factor
    return factor


def corrupt_batch(faults: list[FaultInjection], batch: Batch) -> Batch:
    """Give each source its neighbour's target."""
    if any(fault.kind == "shuffled_targets" for fault in faults):
        sources, targets = batch.lengths.T
        lengths = np.stack([sources, np.roll(targets, 1)], axis=1)
        tgt_in, tgt_out = batch.tgt_in.roll(1, 0), batch.tgt_out.roll(1, 0)
        return dataclasses.replace(batch, tgt_in=tgt_in, tgt_out=tgt_out, lengths=lengths, stored=())
    return batch


def corrupt_loss(faults: list[FaultInjection], loss: torch.Tensor) -> torch.Tensor:
    if any(fault.kind == "nan_loss" for fault in faults):
        return loss * float("nan")
    return loss


def corrupt_teacher(faults: list[FaultInjection], objective: Objective) -> None:
    """Let the teacher recommend each word's neighbour in the vocabulary, for as long as the fault lasts."""
    if isinstance(objective, DistillationObjective):
        objective.teacher_shift = int(any(fault.kind == "garbage_teacher" for fault in faults))


@torch.no_grad()
def corrupt_weights(faults: list[FaultInjection], model: nn.Module) -> None:
    """Add noise to every weight matrix."""
    for fault in faults:
        if fault.kind == "weight_noise":
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.add_(torch.randn_like(parameter) * parameter.std() * fault.factor)
