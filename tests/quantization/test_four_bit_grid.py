"""4-bit packing and rounding against plain loops, and what the grid promises."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from cvm_translator.quantization.four_bit_grid import (
    dequantize_four_bit,
    fake_quantize_four_bit,
    pack_four_bit,
    quantize_four_bit,
    round_step,
    unpack_four_bit,
)

matrices = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=2, max_dims=2, max_side=40),
    elements=st.floats(-1e4, 1e4, width=32) | st.floats(-(2.0**-20), 2.0**-20, width=32) | st.just(0.0),
)
group_sizes = st.none() | st.integers(1, 30).map(lambda half: 2 * half)


@given(hnp.arrays(np.uint8, hnp.array_shapes(max_dims=3, max_side=9), elements=st.integers(0, 15)))
@settings(max_examples=200, deadline=None)
def test_pack_and_unpack_any_shape(codes):
    codes = torch.from_numpy(codes)
    packed = pack_four_bit(codes)
    assert packed.shape == (*codes.shape[:-1], (codes.shape[-1] + 1) // 2)
    assert packed.dtype == torch.uint8
    assert torch.equal(unpack_four_bit(packed, codes.shape[-1]), codes)


def test_byte_layout():
    assert pack_four_bit(torch.tensor([[1, 2, 15, 0]])).tolist() == [[0x21, 0x0F]]
    assert pack_four_bit(torch.tensor([[1, 2, 15]])).tolist() == [[0x21, 0x8F]]  # filled up with the code of zero


@given(matrices, group_sizes, st.booleans())
@settings(max_examples=300, deadline=None)
def test_error_is_at_most_half_a_stored_step_in_every_group(values, group_size, symmetric):
    weight = torch.from_numpy(values.copy())
    quantized = quantize_four_bit(weight, group_size, symmetric)
    group = weight.shape[1] if group_size is None else group_size
    num_groups = -(-weight.shape[1] // group)
    assert quantized.codes.shape == weight.shape
    assert quantized.steps.shape == (weight.shape[0], num_groups)
    assert quantized.steps.dtype == torch.float16
    assert (quantized.zeros is None) == symmetric
    assert int(quantized.codes.max()) <= 15 and int(quantized.codes.min()) >= (1 if symmetric else 0)
    steps = quantized.steps.double().repeat_interleave(group, dim=1)[:, : weight.shape[1]]
    error = (dequantize_four_bit(quantized, group_size).double() - weight.double()).abs()
    assert bool((error <= steps * 0.500001).all())


@given(matrices, group_sizes, st.booleans())
@settings(max_examples=100, deadline=None)
def test_training_sees_exactly_what_is_stored(values, group_size, symmetric):
    weight = torch.from_numpy(values.copy())
    stored = dequantize_four_bit(quantize_four_bit(weight, group_size, symmetric), group_size)
    assert torch.equal(fake_quantize_four_bit(weight, group_size, symmetric), stored)
    assert bool((stored[weight == 0] == 0).all())


@given(st.floats(2.0**-149, 65280.0, width=32))
@settings(max_examples=300, deadline=None)
def test_steps_are_rounded_up_to_numbers_that_float16_and_bfloat16_hold(step):
    rounded = round_step(torch.tensor([step]))
    assert torch.equal(rounded.half().float(), rounded)
    assert rounded.item() >= step
    if step >= 2.0**-14:
        assert torch.equal(rounded.bfloat16().float(), rounded)
        assert rounded.item() <= step * (1 + 2**-7)
    else:
        assert rounded.item() <= step * (1 + 2**-7) + 2.0**-24


def round_group(weights: list[float], symmetric: bool) -> list[float]:
    """The definition, with steps as float16."""

    def round_up(step: float) -> float:
        return round_step(torch.tensor([step])).item() if step else 1.0

    if symmetric:
        step = round_up(max(abs(w) for w in weights) / 7)
        return [max(-7, min(7, round(w / step))) * step for w in weights]
    low, high = min(0.0, *weights), max(0.0, *weights)
    step = round_up((high - low) / 15)
    zero = round(-low / step)
    return [(max(0, min(15, round(w / step) + zero)) - zero) * step for w in weights]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("width", "group_size"), [(64, 32), (70, 32), (5, 64), (33, 2), (33, None)])
def test_values(width, group_size, symmetric):
    weight = torch.randn(6, width, generator=torch.Generator().manual_seed(0))
    weight[2].abs_()  # a row without negative weights
    weight[3].zero_()
    weight[4, 0] = 1000.0  # an outlier
    group = group_size or width
    expected = torch.tensor(
        [
            [v for i in range(0, width, group) for v in round_group(row[i : i + group], symmetric)]
            for row in weight.tolist()
        ]
    )
    actual = dequantize_four_bit(quantize_four_bit(weight, group_size, symmetric), group_size)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
    assert not actual[3].any()
    assert actual[4, 0] == pytest.approx(1000.0, rel=0.01)
    if group < width:
        assert actual[4, group:].any()  # the outlier spoils its own group only


def test_a_coarse_group_loses_more():
    weight = torch.randn(64, 512, generator=torch.Generator().manual_seed(0))
    errors = [(fake_quantize_four_bit(weight, size, True) - weight).square().mean() for size in (16, 64, 256, None)]
    assert errors == sorted(errors)
    assert (fake_quantize_four_bit(weight, 64, False) - weight).square().mean() < errors[1]


def test_gradient_passes_straight_through():
    weight = torch.randn(5, 7, requires_grad=True)
    factor = torch.randn(5, 7)
    (fake_quantize_four_bit(weight, 4, True) * factor).sum().backward()
    assert torch.equal(weight.grad, factor)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_bad_values_show_in_training(bad, symmetric):
    rounded = fake_quantize_four_bit(torch.tensor([[1.0, bad, 2.0], [1.0, 2.0, 3.0]]), None, symmetric)
    assert bool(rounded[0].isnan().any())
    assert bool(rounded[1].isfinite().all())


def test_weights_too_large_for_float16_steps_are_refused():
    quantize_four_bit(torch.tensor([[456_000.0, 1.0]]), None, True)
    with pytest.raises(ValueError, match="too large for a 4-bit grid"):
        quantize_four_bit(torch.tensor([[460_000.0, 1.0]]), None, True)
