"""Fake-quantised modules against integer ones, against torch's own quantised product, and the straight-through
gradient."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from cvm_translator.quantization import Int8Linear, Int8TiedEmbedding, QuantizableLinear, TiedEmbedding
from cvm_translator.quantization.grid import fake_quantize


def assert_relatively_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("shape", [(1, 64), (7, 64), (3, 5, 64)])
@pytest.mark.parametrize("bias", [True, False])
def test_int8_linear_equals_fake_quantised_linear(shape, bias):
    torch.manual_seed(0)
    linear = QuantizableLinear(64, 48, bias=bias)
    linear.fake_quantization = True
    values = torch.randn(shape) * 3
    with torch.no_grad():
        assert_relatively_close(Int8Linear.from_linear(linear)(values), linear(values))


def test_flag_off_is_an_ordinary_linear_layer():
    linear = QuantizableLinear(8, 4)
    values = torch.randn(3, 8)
    assert torch.equal(linear(values), functional.linear(values, linear.weight, linear.bias))


def test_weight_rounding_agrees_with_torch_per_channel_fake_quantisation():
    torch.manual_seed(1)
    weight = torch.randn(16, 40)
    step = weight.abs().amax(1) / 127
    expected = torch.fake_quantize_per_channel_affine(weight, step, torch.zeros(16, dtype=torch.int32), 0, -127, 127)
    torch.testing.assert_close(fake_quantize(weight), expected, rtol=1e-5, atol=1e-6)


def test_gradient_is_that_of_the_rounded_layer():
    torch.manual_seed(2)
    linear = QuantizableLinear(12, 6)
    linear.fake_quantization = True
    values = torch.randn(5, 12, requires_grad=True)
    linear(values).square().sum().backward()
    rounded_values = fake_quantize(values.detach()).requires_grad_()
    rounded_weight = fake_quantize(linear.weight.detach()).requires_grad_()
    functional.linear(rounded_values, rounded_weight, linear.bias.detach()).square().sum().backward()
    torch.testing.assert_close(values.grad, rounded_values.grad)
    torch.testing.assert_close(linear.weight.grad, rounded_weight.grad)


def test_int8_embedding_equals_fake_quantised_embedding():
    torch.manual_seed(3)
    embedding = TiedEmbedding(50, 32)
    embedding.fake_quantization = True
    integer = Int8TiedEmbedding.from_embedding(embedding)
    ids, hidden = torch.tensor([[1, 2, 49], [0, 3, 3]]), torch.randn(2, 3, 32)
    with torch.no_grad():
        assert torch.equal(integer.matrix(), embedding.matrix())
        assert torch.equal(integer.embed(ids), embedding.embed(ids))
        assert torch.equal(integer.round_hidden(hidden), embedding.round_hidden(hidden))
        assert_relatively_close(integer.project(hidden), embedding.project(hidden))


def test_tied_matrix_collects_the_gradient_of_all_its_uses():
    embedding = TiedEmbedding(10, 4)
    embedding.fake_quantization = True
    matrix = embedding.matrix()
    embedding.embed(torch.tensor([3]), matrix).sum().backward(retain_graph=True)
    (embedding.round_hidden(torch.ones(1, 4)) @ matrix.T)[:, 3].sum().backward()
    expected = torch.zeros(10, 4)
    expected[3] = 2.0
    torch.testing.assert_close(embedding.weight.grad, expected)


def test_state_dict_layout():
    state = Int8Linear.from_linear(QuantizableLinear(6, 4)).state_dict()
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in state.items()} == {
        "weight": (torch.int8, (4, 6)),
        "weight_scale": (torch.float32, (4,)),
        "bias": (torch.float32, (4,)),
    }
