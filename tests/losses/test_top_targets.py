"""Top targets against the definition: divergences over k + 1 events, differentiated by autograd."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from cvm_translator.losses import DistillationLoss, TopTargets, find_top_targets

N, D, V, K = 9, 6, 20, 4


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def compute_mass(targets: TopTargets) -> Tensor:
    """(N,) how much of the teacher's distribution the known targets are."""
    return targets.log_probs.exp().sum(-1)


def merge(log_probs: Tensor, indices: Tensor) -> Tensor:
    """Log-probabilities of the chosen targets and of all others together, (N, k + 1)."""
    rest = log_probs.scatter(1, indices, -math.inf).logsumexp(-1, keepdim=True)
    return torch.cat([log_probs.gather(1, indices), rest], dim=1)


def reference(student: Tensor, teacher: Tensor, indices: Tensor, divergence: str) -> Tensor:
    q, p = merge(student, indices), merge(teacher, indices)
    if divergence == "forward_kl":
        return (p.exp() * (p - q)).sum()
    if divergence == "reverse_kl":
        return (q.exp() * (q - p)).sum()
    m = torch.logaddexp(p, q) - math.log(2.0)
    return ((p.exp() * (p - m)).sum() + (q.exp() * (q - m)).sum()) / 2


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "js"])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_value_and_gradient_are_those_of_k_plus_one_events(divergence: str, temperature: float) -> None:
    hidden, matrix = draw(N, D, seed=1).requires_grad_(), (2 * draw(V, D, seed=2)).requires_grad_()
    twins = [tensor.detach().clone().requires_grad_() for tensor in (hidden, matrix)]
    teacher_logits = 3 * draw(N, V, seed=3)
    log_probs, indices = (teacher_logits / temperature).log_softmax(-1).topk(K, dim=-1)
    loss = DistillationLoss(temperature, 1.0, 0.0, divergence=divergence)  # type: ignore[arg-type]
    targets = torch.zeros(N, dtype=torch.int64)
    parts = loss(hidden, matrix, targets, num_tokens=2.0, top_targets=TopTargets(indices, log_probs))
    parts.total.backward()
    student = (twins[0] @ twins[1].T / temperature).log_softmax(-1)
    teacher = (teacher_logits / temperature).log_softmax(-1)
    expected = temperature**2 * reference(student, teacher, indices, divergence) / 2.0
    expected.backward()
    torch.testing.assert_close(parts.total, expected)
    for ours, theirs in zip((hidden, matrix), twins, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_all_targets_are_the_whole_teacher() -> None:
    hidden, matrix, teacher_hidden, teacher_matrix = (
        draw(N, D),
        draw(V, D, seed=1),
        draw(N, 8, seed=2),
        draw(V, 8, seed=3),
    )
    targets = torch.arange(N)
    loss = DistillationLoss(2.0, 0.7, 0.3)
    whole = loss(hidden, matrix, targets, num_tokens=N, teacher_hidden=teacher_hidden, teacher_matrix=teacher_matrix)
    top = find_top_targets(teacher_hidden @ teacher_matrix.T, 2.0, k=1000)
    assert top.indices.shape == (N, V)
    torch.testing.assert_close(compute_mass(top), torch.ones(N))
    found = loss(hidden, matrix, targets, num_tokens=N, top_targets=top)
    torch.testing.assert_close(found.total, whole.total, rtol=1e-5, atol=1e-6)
    assert torch.equal(found.num_correct, whole.num_correct)


def test_fewer_targets_keep_less_and_agreeing_with_them_costs_nothing() -> None:
    logits = draw(N, V)
    masses = [compute_mass(find_top_targets(logits, 1.0, k)).mean().item() for k in (1, 4, 16)]
    assert masses == sorted(masses) and masses[-1] < 1
    identity = torch.eye(V, dtype=torch.float64)
    loss = DistillationLoss(1.0, 1.0, 0.0)
    same = loss(
        logits,
        identity,
        torch.zeros(N, dtype=torch.int64),
        num_tokens=1.0,
        top_targets=find_top_targets(logits, 1.0, 4),
    )
    assert abs(same.total.item()) < 1e-5


def test_a_sure_teacher_in_half_precision_stays_finite() -> None:
    top = TopTargets(torch.zeros(N, 1, dtype=torch.int64), torch.zeros(N, 1, dtype=torch.float16))
    hidden = draw(N, D).requires_grad_()
    loss = DistillationLoss(1.0, 1.0, 0.0)
    parts = loss(hidden, draw(V, D), torch.zeros(N, dtype=torch.int64), num_tokens=1.0, top_targets=top)
    parts.total.backward()
    assert math.isfinite(parts.total.item()) and hidden.grad is not None and hidden.grad.isfinite().all()


def test_targets_of_other_positions_are_refused() -> None:
    loss = DistillationLoss(1.0, 1.0, 0.0)
    with pytest.raises(ValueError, match=r"top targets of \(8, 2\) and \(8, 2\) are not those of 9 positions"):
        loss(
            draw(N, D), draw(V, D), torch.zeros(N, dtype=torch.int64), num_tokens=1.0,
            top_targets=TopTargets(torch.zeros(8, 2, dtype=torch.int64), torch.zeros(8, 2)),
        )  # fmt: skip
