"""The divergences against PyTorch's own functions in float64, and the bounds they keep to."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import kl_div

from cvm_translator.losses import DistillationLoss
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


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("beta", [0.0, 0.4])
def test_the_loss_s_own_forward_kl_is_this_one(
    monkeypatch: pytest.MonkeyPatch, temperature: float, beta: float
) -> None:
    """The loss computes it from what its task term has anyway; asked for by another name it takes the general way."""
    generator = torch.Generator().manual_seed(7)
    student, teacher = (3.0 * torch.randn(N, V, generator=generator, dtype=torch.float64) for _ in range(2))
    targets = torch.randint(V, (N,), generator=generator)
    monkeypatch.setitem(DIVERGENCES, "general", DIVERGENCES["forward_kl"])  # type: ignore[misc]
    results = []
    for name in ("forward_kl", "general"):
        gradient = student.clone()
        loss = DistillationLoss(temperature, 0.7, beta, divergence=name)  # type: ignore[arg-type]
        results.append((*loss.write_gradient(gradient, targets, teacher / temperature), gradient))
    for own, general in zip(*results, strict=True):
        torch.testing.assert_close(own, general)


def test_an_unknown_divergence_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown divergence 'kl': known are forward_kl, reverse_kl, js"):
        DistillationLoss(1.0, 1.0, 1.0, divergence="kl")  # type: ignore[arg-type]
