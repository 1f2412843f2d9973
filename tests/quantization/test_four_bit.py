"""4-bit layers: the fast product against the exact one, what they store, and what they refuse."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from cvm_translator.quantization import FourBitLinear, LayerFormat, TiedEmbedding, kernels
from cvm_translator.quantization.four_bit import FourBitTiedEmbedding
from cvm_translator.quantization.four_bit_grid import find_group
from cvm_translator.quantization.kernels import FourBitKernel, find_kernel_group, has_four_bit_kernel


def make_layer(width: int, num_outputs: int, group_size: int | None, symmetric: bool, bias: bool = True):
    torch.manual_seed(width + num_outputs)
    return FourBitLinear.from_linear(nn.Linear(width, num_outputs, bias=bias), group_size, symmetric)


def assert_within_bound(actual: torch.Tensor, values: torch.Tensor, layer: FourBitLinear) -> None:
    """The bound that `kernels` states, against float64."""
    weight, values = layer.dequantized_weight().double(), values.double()
    product = values @ weight.T
    rounded = weight.abs()
    if len(values) > kernels.FAST_ROWS:
        rounded = 2 * rounded
    elif layer.weight_zero is not None:
        offsets = (8 - layer.weight_zero.double()) * layer.weight_scale.double()
        group = find_group(layer.in_features, layer.layer_format.group_size)
        rounded = rounded + offsets.abs().repeat_interleave(group, 1)[:, : layer.in_features]
    bound = 2.0**-8 * (values.abs() @ rounded.T + product.abs()) * 1.01 + 1e-6  # 1.01: products of two roundings
    expected = product if layer.bias is None else product + layer.bias
    assert bool(((actual.double() - expected).abs() <= bound).all())


@given(
    width=st.integers(1, 300),
    num_outputs=st.integers(1, 40),
    group_size=st.sampled_from([None, 32, 64, 96, 128, 256, 512]),
    symmetric=st.booleans(),
    num_rows=st.integers(1, 9),
    bias=st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_fast_product_agrees_with_the_dequantised_weights(width, num_outputs, group_size, symmetric, num_rows, bias):
    if not has_four_bit_kernel("cpu"):
        pytest.skip("no 4-bit kernel here")
    layer = make_layer(width, num_outputs, group_size, symmetric, bias)
    values = torch.randn(num_rows, width)
    actual = layer(values)
    assert isinstance(layer._prepared, FourBitKernel)
    assert_within_bound(actual, values, layer)
    assert torch.equal(actual, layer(values.unsqueeze(0))[0])


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("width", "group_size"), [(64, 32), (70, 16), (33, 2), (300, 64), (300, None)])
def test_without_a_kernel_the_product_is_exact(monkeypatch, width, group_size, symmetric):
    monkeypatch.setattr("cvm_translator.quantization.kernels.has_four_bit_kernel", lambda device_type: False)
    layer, values = make_layer(width, 24, group_size, symmetric), torch.randn(2, 3, width)
    expected = functional.linear(values, layer.dequantized_weight(), layer.bias)
    assert torch.equal(layer(values), expected)
    assert torch.equal(layer(values), expected)  # from the kept weights


@pytest.mark.parametrize("has_bfloat16", [True, False])
def test_many_rows_are_multiplied_without_the_kernel(monkeypatch, has_bfloat16):
    monkeypatch.setattr(kernels, "has_bfloat16_instructions", lambda device_type: has_bfloat16)
    layer = make_layer(64, 32, 32, False)
    values = torch.randn(kernels.FAST_ROWS + 1, 64)
    layer(values[:1])
    monkeypatch.setattr(FourBitKernel, "multiply", None)
    actual = layer(values)
    assert_within_bound(actual, values, layer)
    exact = functional.linear(values, layer.dequantized_weight()) + layer.bias
    assert torch.equal(actual, exact) == (not has_bfloat16)


def test_a_kernel_that_computes_something_else_is_not_used(monkeypatch):
    if not has_four_bit_kernel("cpu"):
        pytest.skip("no 4-bit kernel here")
    layer, values = make_layer(64, 32, 32, True), torch.randn(3, 64)
    pack = kernels._pack
    monkeypatch.setattr(kernels, "_pack", lambda codes: pack(15 - codes))
    has_four_bit_kernel.cache_clear()
    try:
        assert torch.equal(layer(values), functional.linear(values, layer.dequantized_weight(), layer.bias))
    finally:
        has_four_bit_kernel.cache_clear()


@pytest.mark.parametrize(
    ("width", "group_size", "expected"),
    [
        (256, 64, 64),
        (1024, None, 256),
        (96, None, 32),
        (50, None, 64),
        (50, 512, 64),
        (512, 96, 32),
        (256, 16, None),
        (256, 48, None),
    ],
)
def test_group_sizes_of_the_kernel(width, group_size, expected):
    assert find_kernel_group(width, group_size) == expected


@pytest.mark.parametrize("group_size", [16, 64])
def test_what_the_first_use_kept_is_forgotten_when_the_weights_change(group_size):
    one, other = make_layer(64, 32, group_size, True), make_layer(64, 32, group_size, True)
    with torch.no_grad():
        other.weight_scale.mul_(2)
    values = torch.randn(3, 64)
    one(values), other(values)
    expected = other(values)
    twin = copy.deepcopy(one)
    assert twin._prepared is None
    assert torch.equal(twin(values), one(values))
    one.load_state_dict(other.state_dict())
    assert torch.equal(one(values), expected)
    assert one.to(torch.device("cpu"))._prepared is not None  # nothing moved
    assert one.to(torch.float64)._prepared is None


def test_two_weights_a_byte():
    state = make_layer(128, 32, 64, True).state_dict()
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in state.items()} == {
        "weight": (torch.uint8, (32, 64)),
        "weight_scale": (torch.float16, (32, 2)),
        "bias": (torch.float32, (32,)),
    }
    state = make_layer(33, 5, 32, False, bias=False).state_dict()
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in state.items()} == {
        "weight": (torch.uint8, (5, 17)),
        "weight_scale": (torch.float16, (5, 2)),
        "weight_zero": (torch.uint8, (5, 2)),
    }


@pytest.mark.parametrize("group_size", [3, 0, -4, 2.0])
def test_bad_group_sizes_are_refused(group_size):
    with pytest.raises(ValueError, match="group_size"):
        FourBitLinear.from_linear(nn.Linear(8, 2), group_size=group_size)


def test_nan_weights_are_refused():
    linear = nn.Linear(8, 2)
    with torch.no_grad():
        linear.weight[1, 3] = float("nan")
    with pytest.raises(ValueError, match="weights are NaN or infinite"):
        FourBitLinear.from_linear(linear)


@pytest.mark.parametrize("group_size", [16, 64, None])
def test_embedding_gathers_and_projects_its_dequantised_rows(group_size):
    torch.manual_seed(0)
    embedding = TiedEmbedding(50, 96)
    layer_format = LayerFormat("int4", group_size)
    deployed = FourBitTiedEmbedding.from_weight(embedding.weight, None, layer_format)
    embedding.fake_quantization, embedding.fake_format = True, layer_format
    ids, hidden = torch.tensor([[1, 2, 49], [0, 3, 3]]), torch.randn(2, 3, 96)
    with torch.no_grad():
        assert torch.equal(deployed.matrix(), embedding.matrix())
        assert torch.equal(deployed.embed(ids), embedding.embed(ids))
        assert torch.equal(deployed.round_hidden(hidden), hidden)
        assert torch.equal(deployed.project(hidden), embedding.project(hidden))
        assert torch.equal(deployed.project(hidden, deployed.decoding_matrix()), embedding.project(hidden))
