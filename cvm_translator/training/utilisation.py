"""How much of what the processor can multiply a training step uses: model FLOP utilisation.

The arithmetic of a step is the student's forward pass and twice as much for its backward pass, and what the teacher
must do: a forward pass, or its output matrix alone where its hidden states are stored. The peak is measured, not looked
up: the best of some large square products in the type and with the threads of the run. A machine that was busy then
has a higher peak than was found.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from cvm_translator.corpus.dataset import Batch
from cvm_translator.models.flops import TokenCounts, count_forward_flops, count_logit_flops
from cvm_translator.models.transformer import CvmTransformer
from cvm_translator.training.device import uses_bfloat16

_SIZES = {"cpu": 1024}
_DEFAULT_SIZE = 8192
_NUM_TRIALS = 5
BACKWARD_FACTOR = 2.0


def measure_peak(precision: str, device: torch.device) -> float | None:
    """Floating-point operations per second of the best matrix product found; takes tenths of a second.

    None where the memory is too short for it: a figure of interest must not end a run.
    """
    try:
        return _measure_peak(precision, device)
    except (torch.OutOfMemoryError, MemoryError):
        return None


def _measure_peak(precision: str, device: torch.device) -> float:
    size = _SIZES.get(device.type, _DEFAULT_SIZE)
    dtype = torch.bfloat16 if uses_bfloat16(precision, device) else torch.float32
    generator = torch.Generator(device).manual_seed(0)  # of its own; and a GPU multiplies regular numbers faster
    matrix = torch.randn((size, size), device=device, generator=generator).to(dtype)
    best = float("inf")
    for trial in range(_NUM_TRIALS + 1):  # the first one warms up
        start = time.perf_counter()
        product = matrix @ matrix
        product[0, 0].item()  # waits for the device
        if trial:
            best = min(best, time.perf_counter() - start)
    return 2.0 * size**3 / best


@dataclass(frozen=True)
class StepCost:
    """The arithmetic of a step, and the peak that it is compared with."""

    student: CvmTransformer
    teacher: CvmTransformer | None
    has_stored_states: bool
    peak: float | None
    """Operations per second, if that is known."""

    def count(self, batch: Batch) -> float:
        """Operations that a step on this batch needs."""
        tokens = TokenCounts(len(batch), batch.num_source_tokens, batch.num_tokens)
        student = count_forward_flops(self.student.config, self.student.vocab_size, tokens)
        return (1.0 + BACKWARD_FACTOR) * student + self._count_teacher(tokens)

    def _count_teacher(self, tokens: TokenCounts) -> float:
        if self.teacher is None:
            return 0.0
        if self.has_stored_states:
            return count_logit_flops(self.teacher.config.dim, self.teacher.vocab_size, tokens.num_target)
        return count_forward_flops(self.teacher.config, self.teacher.vocab_size, tokens)
