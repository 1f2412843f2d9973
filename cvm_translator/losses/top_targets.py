"""A teacher of which only the k likeliest targets of each position are known, and how much they leave.

The divergence is that between two distributions over k + 1 events: each of the k targets, and any other. It equals the
divergence from a teacher over the whole vocabulary that shares out its remaining mass as the student does, and so has
that one's gradient: within the rest both sides agree, whatever the student says there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

MIN_REMAINING_MASS = 1e-6
"""Below what half precision tells of a sum of probabilities."""


@dataclass(frozen=True)
class TopTargets:
    """Of N positions, at the loss's temperature."""

    indices: Tensor
    """(N, k) int64, different ones in a row."""
    log_probs: Tensor
    """(N, k)"""

    def __getitem__(self, rows: slice) -> TopTargets:
        return TopTargets(self.indices[rows], self.log_probs[rows])

    def to(self, device: torch.device) -> TopTargets:
        return TopTargets(self.indices.to(device), self.log_probs.to(device))

    def spread(self, student: Tensor) -> Tensor:
        """The teacher's log-probabilities (N, V), given the student's (N, V)."""
        log_probs = self.log_probs.to(student.dtype)
        remaining = (1.0 - log_probs.exp().sum(-1, keepdim=True)).clamp_min(MIN_REMAINING_MASS).log()
        rest = student.scatter(1, self.indices, -math.inf).logsumexp(-1, keepdim=True)
        return (student + (remaining - rest)).scatter_(1, self.indices, log_probs)


def find_top_targets(logits: Tensor, temperature: float, k: int) -> TopTargets:
    """The k likeliest targets of logits (N, V) at a temperature."""
    log_probs, indices = (logits.float() / temperature).log_softmax(-1).topk(min(k, logits.shape[1]), dim=-1)
    return TopTargets(indices, log_probs)
