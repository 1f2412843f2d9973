"""What a training loop is given, and what it hands back."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from cvm_translator.checkpoints.store import CheckpointStore
from cvm_translator.config.schema import FaultInjection, GuardConfig, TrainingConfig
from cvm_translator.corpus.batches import BatchSchedule
from cvm_translator.corpus.dataset import DistillationDataset
from cvm_translator.models.transformer import CvmTransformer
from cvm_translator.runs.events import EventWriter
from cvm_translator.training.guard import Judge
from cvm_translator.training.objectives import Objective
from cvm_translator.training.signals import StopRequest
from cvm_translator.training.state import LoopState


@dataclass
class LoopSetup:
    """The finished parts of one loop."""

    stage: str
    """teacher or distil: the name in the events."""
    settings: TrainingConfig
    guard: GuardConfig
    model: CvmTransformer
    objective: Objective
    dataset: DistillationDataset
    batches: BatchSchedule
    store: CheckpointStore
    events: EventWriter
    judge: Judge
    stop: StopRequest
    device: torch.device
    validate_every_steps: int
    quantize_from_step: int | None = None
    """First step that is fake-quantised; None: never."""
    faults: list[FaultInjection] | None = None
    num_threads: int | None = None
    """The thread count that the config asks for, if it asks for one."""


@dataclass(frozen=True)
class LoopOutcome:
    """How a loop ended."""

    state: LoopState
    final_checkpoint: str
    """Name of the checkpoint to deliver: the best one, or the last where the guard is off."""
    halted: str | None
    """Why the loop ended before `num_iterations`, if it did."""
