"""What a step minimises: tensors of one batch in, the parts of the loss out.

Both objectives select the real target tokens before the output layer, so padding costs no logits. The sum over tokens
is divided by the token count of the whole effective batch, which makes the gradient under accumulation equal to that
of the uncut batch, whatever the micro-batches' token counts are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from cvm_translator.corpus.dataset import Batch
from cvm_translator.losses import DistillationLoss, LossParts, TopTargets
from cvm_translator.models.transformer import CvmTransformer
from cvm_translator.teachers.states import StoredTeacher, TeacherStates, TeacherTopTargets


def find_real_targets(batch: Batch) -> torch.Tensor:
    """(N,) places of the real target tokens in the flattened (B, T) batch; from their counts, so no device is asked."""
    is_real = np.arange(batch.tgt_out.shape[1]) < batch.lengths[:, 1:]
    places, device = torch.from_numpy(np.flatnonzero(is_real)), batch.tgt_out.device
    return places.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else places.to(device)


Forward = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""See `CvmTransformer.forward`."""


class _Known(NamedTuple):
    """What the loss takes of the teacher at N real targets: two tensors, or the third, or nothing."""

    hidden: torch.Tensor | None = None
    """(N, D)"""
    matrix: torch.Tensor | None = None
    """(V, D)"""
    top_targets: TopTargets | None = None


def _compile(model: CvmTransformer) -> Forward:
    """For batches of any shape.

    Norms' weight gradients are left to a kernel of their own: with the rest of the backward pass in one kernel, both
    together took twice as long on an H200 (torch 2.11).
    """
    from torch._dynamo import config as tracing
    from torch._inductor import list_options

    tracing.specialize_float = True  # what `dynamic` is to make variable are shapes, not the constants of a formula
    wanted: dict[str, Any] = {"triton.mix_order_reduction": False}
    options = {name: value for name, value in wanted.items() if name in list_options()}
    compiled: Forward = torch.compile(model, dynamic=True, options=options)
    return compiled


class Objective(Protocol):
    """Computes the loss of one (micro-)batch."""

    def __call__(self, batch: Batch, num_tokens: int) -> LossParts:
        """`num_tokens`: real target tokens of the whole effective batch, by which the sum is divided."""
        ...

    def compile(self) -> None:
        """Compute through PyTorch's compiler from now on."""
        ...


class DistillationObjective:
    """alpha · T² · divergence from the teacher + beta · cross-entropy; the task term alone without a teacher.

    The teacher runs in evaluation mode and without gradients; with `stored`, what it said is taken from the batch, or
    read where the batch does not bring it.
    """

    def __init__(
        self,
        student: CvmTransformer,
        loss: DistillationLoss,
        teacher: CvmTransformer | None = None,
        stored: StoredTeacher | None = None,
    ) -> None:
        self.student = student
        self.loss = loss
        self.teacher = teacher
        self.stored = stored
        self.teacher_shift = 0
        """A planted fault: the teacher recommends words so many places further in the vocabulary."""
        if teacher is not None:
            teacher.eval().requires_grad_(False)
        self._run_student: Forward = student
        self._run_teacher: Forward | None = teacher

    def compile(self) -> None:
        """Run what a step calls through PyTorch's compiler from now on; the models themselves stay as they are."""
        self._run_student = _compile(self.student)
        if self.teacher is not None:
            self._run_teacher = _compile(self.teacher)

    def __call__(self, batch: Batch, num_tokens: int) -> LossParts:
        real = find_real_targets(batch)  # (N,)
        targets = batch.tgt_out.flatten()[real]
        hidden, matrix = self._run_student(batch.src, batch.src_mask, batch.tgt_in)  # (B, T, D), (V, D)
        selected = hidden.flatten(0, 1)[real]  # (N, D)
        known = self._ask_teacher(batch, real)
        return self.loss(
            selected,
            matrix,
            targets,
            num_tokens=num_tokens,
            teacher_hidden=known.hidden,
            teacher_matrix=known.matrix,
            top_targets=known.top_targets,
        )

    @torch.no_grad()
    def _ask_teacher(self, batch: Batch, real: torch.Tensor) -> _Known:
        if self.teacher is None or self._run_teacher is None:
            return _Known()
        rows = batch.stored
        if self.stored is not None and not rows:
            rows = tuple(part.to(batch.src.device) for part in self.stored.read(batch.indices))
        if isinstance(self.stored, TeacherTopTargets):
            return _Known(top_targets=TopTargets(*rows))
        if isinstance(self.stored, TeacherStates):
            hidden, matrix = rows[0], self.teacher.embedding.matrix()
        else:
            hidden, matrix = self._run_teacher(batch.src, batch.src_mask, batch.tgt_in)
            hidden = hidden.flatten(0, 1)[real]
        return _Known(hidden, matrix.roll(self.teacher_shift, 0) if self.teacher_shift else matrix)
