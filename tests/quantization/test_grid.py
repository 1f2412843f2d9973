"""The 8-bit grid against CTranslate2's converter, written out with numpy, and its gradient."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from cvm_translator.quantization.grid import (
    dequantize_int8,
    fake_quantize,
    has_exact_int_mm,
    linear_int8,
    multiply_int8,
    quantize_int8,
)

rows = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=2, max_dims=2, max_side=12),
    elements=st.floats(-1e4, 1e4, width=32) | st.floats(-(2.0**-119), 2.0**-119, width=32),
)
SMALLEST = (63.5 + 2.0**-17) * 2.0**-127
"""The smallest largest number of a row that has a scale."""


def quantize_like_ctranslate2(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """ModelSpec._quantize for int8 (and quantize_s8_row, which differs only in its name for an empty row's scale).

    Rows whose scale is infinite, which have no integers there, are taken for empty ones.
    """
    amax = np.amax(np.absolute(values), axis=1)
    with np.errstate(divide="ignore", over="ignore"):
        is_empty = np.isinf(np.float32(127.0) / amax)
    amax[is_empty] = 127.0
    values = np.where(is_empty[:, None], 0, values)
    scale = (127.0 / amax).astype(np.float32)
    return np.rint(values * scale[:, None]).astype(np.int8), scale


@given(rows)
@settings(max_examples=200, deadline=None)
def test_integers_equal_ctranslate2(values):
    integers, steps = quantize_int8(torch.from_numpy(values.copy()))
    expected, scale = quantize_like_ctranslate2(values)
    assert np.array_equal(integers.numpy(), expected)
    np.testing.assert_allclose(steps.numpy()[:, 0], 1.0 / scale, rtol=1e-6)


@given(rows)
@settings(max_examples=200, deadline=None)
def test_grid_properties(values):
    tensor = torch.from_numpy(values.copy())
    integers, steps = quantize_int8(tensor)
    restored = dequantize_int8(integers, steps)
    assert integers.abs().max() <= 127
    assert bool(((restored - tensor).abs() <= steps * 0.5001).all())
    assert torch.equal(fake_quantize(tensor), restored)
    # what was rounded once stays where it is, unless that is too small for a scale
    is_kept = restored.abs().amax(1) >= SMALLEST
    again, _ = quantize_int8(restored)
    assert torch.equal(again[is_kept], integers[is_kept]) and not again[~is_kept].any()
    assert torch.equal(quantize_int8(-tensor)[0], -integers)


def test_rounds_half_to_even():
    integers, _ = quantize_int8(torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5]]))
    assert integers.tolist() == [[127, 0, 2, 2, 0, -2]]


def test_zero_rows_stay_zero_and_do_not_disturb_others():
    values = torch.tensor([[0.0, 0.0], [1.0, -2.0]])
    rounded = fake_quantize(values)
    assert rounded[0].tolist() == [0.0, 0.0]
    assert rounded[1, 1] == pytest.approx(-2.0)


@pytest.mark.parametrize("largest", [2.0**-149, 2.0**-126, (63.5 + 2.0**-18) * 2.0**-127])
def test_rows_too_small_for_a_scale_are_zeros(largest):
    values = torch.tensor([[largest, -largest, 0.0], [1.0, 2.0, 3.0]], requires_grad=True)
    integers, steps = quantize_int8(values.detach())
    assert (integers[0].tolist(), steps[0].item()) == ([0, 0, 0], 1.0)
    rounded = fake_quantize(values)
    assert rounded[0].tolist() == [0.0, 0.0, 0.0] and bool(rounded.isfinite().all())
    rounded.sum().backward()
    assert torch.equal(values.grad, torch.ones(2, 3))


def test_the_smallest_row_with_a_scale():
    smallest = torch.tensor([[SMALLEST]])
    integers, _ = quantize_int8(smallest)
    assert integers.item() == 127 and bool((127 / smallest).isfinite())
    below = torch.nextafter(smallest, torch.zeros(1, 1))
    assert (quantize_int8(below)[0].item(), (127 / below).item()) == (0, float("inf"))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_bad_values_make_their_row_nan_and_no_other(bad):
    rounded = fake_quantize(torch.tensor([[1.0, bad, 2.0], [1.0, 2.0, 3.0]]))
    assert bool(rounded[0].isnan().any())
    assert bool(rounded[1].isfinite().all())


def test_gradient_passes_straight_through():
    values = torch.randn(5, 7, requires_grad=True)
    weights = torch.randn(5, 7)
    (fake_quantize(values) * weights).sum().backward()
    assert torch.equal(values.grad, weights)


def test_integer_product_is_exact_at_the_extremes():
    left = torch.full((3, 2050), 127, dtype=torch.int8)
    right = torch.full((5, 2050), -127, dtype=torch.int8)
    right[:, ::3] = 127
    assert torch.equal(multiply_int8(left, right).double(), left.double() @ right.double().T)


def test_float_fallback_equals_the_integer_kernel(monkeypatch):
    if not has_exact_int_mm("cpu"):
        pytest.skip("no integer kernel to compare with")
    values, weight, bias = torch.randn(4, 3, 300), torch.randn(10, 300), torch.randn(10)
    integers, steps = quantize_int8(weight)
    expected = linear_int8(values, integers, steps.flatten(), bias)
    monkeypatch.setattr("cvm_translator.quantization.grid.has_exact_int_mm", lambda device_type: False)
    assert torch.equal(linear_int8(values, integers, steps.flatten(), bias), expected)


def test_integers_are_multiplied_exactly_at_every_inner_width() -> None:
    """torch._int_mm gives other numbers for an inner width of one."""
    generator = torch.Generator().manual_seed(3)
    for width in (1, 2, 3, 64, 1500):
        left, right = (
            torch.randint(-127, 128, (rows, width), dtype=torch.int8, generator=generator) for rows in (17, 5)
        )
        assert torch.equal(multiply_int8(left, right).int(), left.int() @ right.int().T)
