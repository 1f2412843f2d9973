"""How far the student's distribution q is from the teacher's p, and the gradient with respect to the student's logits.

    forward_kl   KL(p ‖ q)                                  q must cover all that p says
    reverse_kl   KL(q ‖ p)                                  q may keep to p's main modes
    js           ½ KL(p ‖ m) + ½ KL(q ‖ m), m = ½ (p + q)   between the two, at most ln 2

(Gu et al., 2024, arXiv:2306.08543 on the reverse one; Agarwal et al., 2024, arXiv:2306.13649 on the third.) With
q = softmax(z), the gradients are

    q − p,    q · (log q/p − KL(q ‖ p)),    ½ q · (log q/m − KL(q ‖ m)).

Works from log-probabilities, so that nothing overflows where one side is almost sure; sums over rows are returned.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor


def forward_kl(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Of log-probabilities (N, V) each: the sum over the rows and the gradient (N, V)."""
    teacher_probs = teacher.exp()
    divergence = torch.dot((teacher - student).flatten(), teacher_probs.flatten())
    return divergence, student.exp().sub_(teacher_probs)


def reverse_kl(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """As `forward_kl`."""
    return _relative_entropy(student, teacher)


def jensen_shannon(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """As `forward_kl`."""
    mean = torch.logaddexp(student, teacher).sub_(math.log(2.0))
    of_student, gradient = _relative_entropy(student, mean)
    of_teacher = torch.dot((teacher - mean).flatten(), teacher.exp().flatten())
    return (of_student + of_teacher) / 2.0, gradient.div_(2.0)


def _relative_entropy(student: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """KL(q ‖ other) summed over the rows, and q · (log q/other − KL of the row)."""
    probs, ratio = student.exp(), student - other
    divergence = (probs * ratio).sum(-1, keepdim=True)
    return divergence.sum(), probs.mul_(ratio.sub_(divergence))


DIVERGENCES: Mapping[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "js": jensen_shannon,
}
