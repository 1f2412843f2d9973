"""Attention of short sequences in one kernel, against PyTorch's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

TOLERANCE = {torch.float16: 4e-3, torch.bfloat16: 3e-2}


def draw(kernel_device: torch.device, dtype: torch.dtype, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator).to(kernel_device, dtype).requires_grad_()


@pytest.mark.parametrize("length", [1, 5, 20, 70])
@pytest.mark.parametrize(
    ("num_keys", "causal", "masked"),
    [(None, False, False), (None, True, False), (None, False, True), (17, False, True)],
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_values_and_gradients(
    kernel_device: torch.device, length: int, num_keys: int | None, causal: bool, masked: bool, dtype: torch.dtype
) -> None:
    """Of a sequence to itself, a target's to its own past, and of one to another of `num_keys`."""
    if kernel_device.type == "cpu" and dtype == torch.bfloat16:
        pytest.skip("the interpreter has no bfloat16")
    from cvm_translator.models.short_attention import attend_briefly, can_attend

    num_keys = length if num_keys is None else num_keys
    queries = draw(kernel_device, dtype, 3, length, 2, 16)  # (B, T, H, d)
    both = draw(kernel_device, dtype, 3, num_keys, 2, 2, 16)  # keys beside values, as the layers make them
    q = queries.transpose(1, 2)
    k, v = both.permute(2, 0, 3, 1, 4).unbind(0)
    lengths = torch.tensor([num_keys, 1, max(1, num_keys // 2)], device=kernel_device)
    mask = (torch.arange(num_keys, device=kernel_device) < lengths[:, None])[:, None, None, :] if masked else None
    assert can_attend(q, k, mask)
    found = attend_briefly(q, k, v, mask, causal=causal)
    expected = scaled_dot_product_attention(q.double(), k.double(), v.double(), attn_mask=mask, is_causal=causal)
    grad = draw(kernel_device, dtype, *found.shape).detach()
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)
    for ours, theirs in zip(
        torch.autograd.grad(found, (queries, both), grad),
        torch.autograd.grad(expected, (queries, both), grad.double()),
        strict=True,
    ):
        torch.testing.assert_close(ours.double(), theirs.double(), rtol=tolerance, atol=2 * tolerance)


def test_what_it_does_not_take(kernel_device: torch.device) -> None:
    from cvm_translator.models.short_attention import MAX_LENGTH, can_attend

    short = draw(kernel_device, torch.float16, 2, 2, 9, 16)
    assert can_attend(short, short, None)
    assert not can_attend(short.float(), short.float(), None)
    long = draw(kernel_device, torch.float16, 2, 2, MAX_LENGTH + 1, 16)
    assert not can_attend(short, long, None) and not can_attend(long, short, None)
    narrow = draw(kernel_device, torch.float16, 2, 2, 9, 8)
    assert not can_attend(narrow, narrow, None)
    assert not can_attend(short, short, torch.zeros(2, 2, 1, 9, device=kernel_device))  # what slots add to the logits
