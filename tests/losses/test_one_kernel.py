"""The loss's gradient in one kernel, against PyTorch's operators."""

from __future__ import annotations

import pytest
import torch

from cvm_translator.losses import DistillationLoss

NUM_ROWS, NUM_CLASSES = 9, 37


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "js"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize(("alpha", "beta"), [(0.8, 0.2), (1.0, 0.0), (0.0, 1.0)])
def test_sums_and_gradient(
    kernel_device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
    divergence: str,
    temperature: float,
    smoothing: float,
    alpha: float,
    beta: float,
) -> None:
    from cvm_translator.losses import one_kernel

    monkeypatch.setattr(one_kernel, "_BLOCK", 16)  # a row takes several, the last of them not full
    loss = DistillationLoss(temperature, alpha, beta, smoothing, divergence)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(3)
    logits = 3.0 * torch.randn(NUM_ROWS, NUM_CLASSES, generator=generator)
    teacher = torch.randn(NUM_ROWS, NUM_CLASSES, generator=generator) / temperature if alpha else None
    targets = torch.randint(0, NUM_CLASSES, (NUM_ROWS,), generator=generator)
    targets[0] = logits[0].argmax()
    ours = logits.to(kernel_device, copy=True)
    found = loss.write_gradient_in_one_kernel(
        ours, targets.to(kernel_device), None if teacher is None else teacher.to(kernel_device)
    )
    theirs = logits.double()
    expected = loss.write_gradient(theirs, targets, None if teacher is None else teacher.double())
    for mine, other in zip((*found, ours), (*expected, theirs), strict=True):
        torch.testing.assert_close(mine.cpu().double(), other.double(), rtol=1e-4, atol=1e-5)


def test_a_number_that_is_none_reaches_the_loss(kernel_device: torch.device) -> None:
    loss = DistillationLoss(2.0, 0.8, 0.2)
    logits, teacher = torch.randn(2, NUM_CLASSES), torch.randn(2, NUM_CLASSES)
    logits[0, 5] = torch.nan
    distillation, task, _ = loss.write_gradient_in_one_kernel(
        logits.to(kernel_device), torch.tensor([1, 2], device=kernel_device), teacher.to(kernel_device)
    )
    assert task.isnan() and distillation.isnan()


def test_rows_with_gaps_are_refused(kernel_device: torch.device) -> None:
    wide = torch.randn(2, 2 * NUM_CLASSES, device=kernel_device)
    with pytest.raises(ValueError, match="without gaps"):
        DistillationLoss(2.0, 0.8, 0.2).write_gradient_in_one_kernel(
            wide[:, ::2], torch.tensor([1, 2], device=kernel_device), None
        )
