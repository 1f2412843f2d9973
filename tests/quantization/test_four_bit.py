"""4-bit packing and rounding against plain loops."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from cvm_translator.quantization import FourBitLinear
from cvm_translator.quantization.four_bit import pack_four_bit, unpack_four_bit


@given(st.integers(1, 6), st.integers(1, 9), st.data())
@settings(max_examples=100, deadline=None)
def test_pack_and_unpack(num_rows, half_width, data):
    size = num_rows * half_width * 2
    integers = torch.tensor(data.draw(st.lists(st.integers(0, 15), min_size=size, max_size=size)))
    integers = integers.view(num_rows, half_width * 2)
    packed = pack_four_bit(integers)
    assert packed.shape == (num_rows, half_width)
    assert packed.dtype == torch.uint8
    assert torch.equal(unpack_four_bit(packed), integers.to(torch.uint8))


def test_byte_layout():
    assert pack_four_bit(torch.tensor([[1, 2, 15, 0]])).tolist() == [[0x21, 0x0F]]
    with pytest.raises(ValueError, match="even"):
        pack_four_bit(torch.tensor([[1, 2, 3]]))


def round_group(weights: list[float], symmetric: bool) -> list[float]:
    if symmetric:
        step = max(abs(w) for w in weights) / 7 or 1.0
        return [max(-8, min(7, round(w / step))) * step for w in weights]
    low, high = min(0.0, *weights), max(0.0, *weights)
    step = (high - low) / 15 or 1.0
    zero = round(-low / step)
    return [(max(0, min(15, round(w / step) + zero)) - zero) * step for w in weights]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("width", "group_size"), [(64, 32), (70, 32), (5, 64), (33, 2)])
def test_values_and_forward(width, group_size, symmetric):
    torch.manual_seed(0)
    linear = nn.Linear(width, 6)
    with torch.no_grad():
        linear.weight[2].abs_()  # a row without negative weights
        linear.weight[3].zero_()
    four_bit = FourBitLinear.from_linear(linear, group_size=group_size, symmetric=symmetric)
    expected = torch.tensor(
        [
            [v for i in range(0, width, group_size) for v in round_group(row[i : i + group_size], symmetric)]
            for row in linear.weight.tolist()
        ]
    )
    torch.testing.assert_close(four_bit.dequantized_weight(), expected, rtol=1e-5, atol=1e-6)
    values = torch.randn(4, 3, width)
    torch.testing.assert_close(
        four_bit(values), nn.functional.linear(values, expected, linear.bias), rtol=1e-4, atol=1e-5
    )


def test_two_weights_a_byte():
    four_bit = FourBitLinear.from_linear(nn.Linear(128, 32, bias=False), group_size=64)
    assert four_bit.weight.numel() * four_bit.weight.element_size() == 128 * 32 // 2
    assert four_bit.weight_scale.shape == (32, 2)


def test_odd_group_sizes_are_refused():
    with pytest.raises(ValueError, match="group_size"):
        FourBitLinear.from_linear(nn.Linear(8, 2), group_size=3)
