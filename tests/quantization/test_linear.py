"""What training sees: fake-quantised layers against torch's own, and the straight-through gradient."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from cvm_translator.quantization import LayerFormat, QuantizableLinear, TiedEmbedding, look_up
from cvm_translator.quantization.grid import fake_quantize
from cvm_translator.quantization.linear import FAKE_WEIGHTS

FORMATS = [LayerFormat(kind) for kind in FAKE_WEIGHTS if kind != "int4"]
FORMATS += [LayerFormat("int4", 4), LayerFormat("int4", None, symmetric=False)]


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


@pytest.mark.parametrize("layer_format", FORMATS, ids=str)
def test_gradient_is_that_of_the_rounded_layer(layer_format):
    torch.manual_seed(2)
    linear = QuantizableLinear(12, 6)
    linear.fake_quantization, linear.fake_format = True, layer_format
    values = torch.randn(5, 12, requires_grad=True)
    linear(values).square().sum().backward()
    rounds_inputs = layer_format.kind == "int8"
    rounded_values = (fake_quantize(values) if rounds_inputs else values).detach().requires_grad_()
    rounded_weight = FAKE_WEIGHTS[layer_format.kind](linear.weight, layer_format).detach().requires_grad_()
    assert torch.equal(rounded_weight, linear.weight) == (layer_format.kind == "float32")
    functional.linear(rounded_values, rounded_weight, linear.bias.detach()).square().sum().backward()
    torch.testing.assert_close(values.grad, rounded_values.grad)
    torch.testing.assert_close(linear.weight.grad, rounded_weight.grad)


@pytest.mark.parametrize("layer_format", FORMATS, ids=str)
def test_tied_matrix_collects_the_gradient_of_all_its_uses(layer_format):
    embedding = TiedEmbedding(10, 4)
    embedding.fake_quantization, embedding.fake_format = True, layer_format
    matrix = embedding.matrix()
    embedding.embed(torch.tensor([3]), matrix).sum().backward(retain_graph=True)
    (embedding.round_hidden(torch.ones(1, 4)) @ matrix.T)[:, 3].sum().backward()
    expected = torch.zeros(10, 4)
    expected[3] = 2.0
    torch.testing.assert_close(embedding.weight.grad, expected)


@pytest.mark.parametrize("expanded", [False, True])
def test_lookups_have_the_gradient_of_torchs_embeddings(expanded: bool):
    torch.manual_seed(3)
    ours = TiedEmbedding(10, 4)
    theirs = ours.weight.detach().clone().requires_grad_()
    src, tgt = torch.tensor([[3, 3, 7]]), torch.tensor([[7], [0]])
    upstream = [torch.randn(10, 4), torch.randn(1, 3, 4), torch.randn(2, 1, 4)]
    if expanded:  # a gradient that cannot be added to in place
        upstream[0] = torch.tensor(2.0).expand(10, 4)
    before = upstream[0].clone()
    torch.autograd.backward(look_up(ours, src, tgt), upstream)
    torch.autograd.backward(
        [theirs, functional.embedding(src, theirs), functional.embedding(tgt, theirs)], [before, *upstream[1:]]
    )
    torch.testing.assert_close(ours.weight.grad, theirs.grad)
    with torch.no_grad():
        matrix, rows, _ = look_up(ours, src, tgt)
    assert torch.equal(matrix, ours.weight) and torch.equal(rows, ours.embed(src))
