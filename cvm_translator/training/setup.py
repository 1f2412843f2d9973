"""What a training loop is given, and what it hands back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from cvm_translator.checkpoints.store import CheckpointStore
from cvm_translator.config.schema import FaultInjection, GuardConfig, TrainingConfig
from cvm_translator.corpus.batches import BatchSchedule
from cvm_translator.corpus.dataset import DistillationDataset
from cvm_translator.corpus.prefetch import ReadStored
from cvm_translator.models.transformer import CvmTransformer
from cvm_translator.runs.control import ControlFile
from cvm_translator.runs.events import EventWriter
from cvm_translator.runs.heartbeat import Heartbeat
from cvm_translator.training.guard import Judge, LateJudge
from cvm_translator.training.objectives import Objective
from cvm_translator.training.signals import StopRequest
from cvm_translator.training.state import LoopState
from cvm_translator.training.utilisation import StepCost
from cvm_translator.training.widths import NO_COURSE, WidthCourse


def leave_as_it_is(model: CvmTransformer, bits: int) -> None:
    """The preparation of a model whose training knows nothing of rounding."""


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
    late: LateJudge | None = None
    """The judge again, where it can score while training goes on."""
    widths: WidthCourse = NO_COURSE
    """The bit widths that training sees."""
    prepare: Callable[[CvmTransformer, int], object] = leave_as_it_is
    """Makes the model's forward pass round to so many bits (UNROUNDED_BITS: not at all)."""
    heartbeat: Heartbeat = field(default_factory=Heartbeat)
    control: ControlFile | None = None
    """What observers ask for, if anybody can."""
    cost: StepCost | None = None
    """What a step's arithmetic is, where its share of the machine's is to be told."""
    read_stored: ReadStored | None = None
    """Reads what is stored of the teacher, so that the batches bring it."""
    faults: list[FaultInjection] | None = None
    is_compiled: bool = False
    """Whether steps run through PyTorch's compiler."""
    num_threads: int | None = None
    """The thread count that the config asks for, if it asks for one."""

    def tell(self, state: LoopState, kind: str, **fields: Any) -> None:
        """Write an event of this stage, at the step where its loop stands."""
        self.events.write(kind, step=state.step, attempt=state.attempt, stage=self.stage, **fields)


@dataclass(frozen=True)
class LoopOutcome:
    """How a loop ended."""

    state: LoopState
    final_checkpoint: str
    """Name of the checkpoint to deliver: the best one, or the last where the guard is off."""
    halted: str | None
    """Why the loop ended before `num_iterations`, if it did."""
    bits: int
    """The width at which the final checkpoint was judged."""
