"""The divergences against PyTorch's own functions in float64, and the bounds they keep to."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import kl_div

from cvm_translator.losses.divergences import DIVERGENCES

N, V = 7, 29


def compute_reference(name: str, student: Tensor, teacher: Tensor) -> Tensor:
    """By the definitions, from probabilities' logarithms; `kl_div(a, b)` is KL(b ‖ a)."""
    mean = ((student.exp() + teacher.exp()) / 2).log()

    def divergence(of: Tensor, to: Tensor) -> Tensor:
        return kl_div(to, of, reduction="sum", log_target=True)

    return {
        "forward_kl": divergence(teacher, student),
        "reverse_kl": divergence(student, teacher),
        "js": (divergence(teacher, mean) + divergence(student, mean)) / 2,
    }[name]


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("scale", [0.1, 3.0, 30.0])
def test_value_and_gradient(name: str, scale: float) -> None:
    generator = torch.Generator().manual_seed(5)
    student, teacher = (scale * torch.randn(N, V, generator=generator, dtype=torch.float64) for _ in range(2))
    student.requires_grad_()
    teacher = teacher.log_softmax(-1)
    reference = compute_reference(name, student.log_softmax(-1), teacher)
    (expected,) = torch.autograd.grad(reference, student)
    value, gradient = DIVERGENCES[name](student.detach().log_softmax(-1), teacher)
    torch.testing.assert_close(value, reference.detach())
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_equal_distributions_are_no_distance_apart(name: str) -> None:
    log_probs = torch.randn(N, V, generator=torch.Generator().manual_seed(6)).log_softmax(-1)
    value, gradient = DIVERGENCES[name](log_probs, log_probs)
    assert abs(value.item()) < 1e-5 and gradient.abs().max().item() < 1e-6


def test_jensen_shannon_is_bounded_where_the_others_are_not() -> None:
    student = torch.tensor([[0.0, 80.0]], dtype=torch.float64).log_softmax(-1)
    teacher = torch.tensor([[80.0, 0.0]], dtype=torch.float64).log_softmax(-1)
    assert DIVERGENCES["js"](student, teacher)[0].item() == pytest.approx(math.log(2))
    assert DIVERGENCES["forward_kl"](student, teacher)[0].item() == pytest.approx(80.0)
    assert DIVERGENCES["reverse_kl"](student, teacher)[0].item() == pytest.approx(80.0)
