"""Attention of short sequences in one kernel, against PyTorch's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

TOLERANCE = {torch.float16: 4e-3, torch.bfloat16: 3e-2}


def draw(device: torch.device, dtype: torch.dtype, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator).to(device, dtype).requires_grad_()


@pytest.mark.parametrize(("num_queries", "num_keys"), [(1, 1), (5, 5), (20, 17), (33, 70)])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_values_and_gradients(
    device: torch.device, num_queries: int, num_keys: int, causal: bool, masked: bool, dtype: torch.dtype
) -> None:
    if causal and (masked or num_queries != num_keys):
        pytest.skip("a target sees its own past, of which nothing is masked")
    if device.type == "cpu" and dtype == torch.bfloat16:
        pytest.skip("the interpreter has no bfloat16")
    from cvm_translator.kernels.attention import attend_briefly, can_attend

    queries = draw(device, dtype, 3, num_queries, 2, 16)  # (B, T, H, d)
    both = draw(device, dtype, 3, num_keys, 2, 2, 16)  # keys and values lie beside each other, as the layers make them
    q = queries.transpose(1, 2)
    k, v = both.permute(2, 0, 3, 1, 4).unbind(0)
    lengths = torch.tensor([num_keys, 1, max(1, num_keys // 2)], device=device)
    mask = (torch.arange(num_keys, device=device) < lengths[:, None])[:, None, None, :] if masked else None
    assert can_attend(q, k, mask)
    found = attend_briefly(q, k, v, mask, causal=causal)
    expected = scaled_dot_product_attention(q.double(), k.double(), v.double(), attn_mask=mask, is_causal=causal)
    grad = draw(device, dtype, *found.shape).detach()
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)
    for ours, theirs in zip(
        torch.autograd.grad(found, (queries, both), grad),
        torch.autograd.grad(expected, (queries, both), grad.double()),
        strict=True,
    ):
        torch.testing.assert_close(ours.double(), theirs.double(), rtol=tolerance, atol=2 * tolerance)


def test_what_it_does_not_take(device: torch.device) -> None:
    from cvm_translator.kernels.attention import MAX_LENGTH, can_attend

    short = draw(device, torch.float16, 2, 2, 9, 16)
    assert can_attend(short, short, None)
    assert not can_attend(short.float(), short.float(), None)
    long = draw(device, torch.float16, 2, 2, MAX_LENGTH + 1, 16)
    assert not can_attend(short, long, None) and not can_attend(long, short, None)
    narrow = draw(device, torch.float16, 2, 2, 9, 8)
    assert not can_attend(narrow, narrow, None)
    assert not can_attend(short, short, torch.zeros(2, 2, 1, 9, device=device))  # what slots add to the logits
