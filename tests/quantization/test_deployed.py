"""Deployed layers against fake-quantised ones and plain arithmetic, and the calibration of static activations."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from cvm_translator.quantization import LayerFormat, QuantizableLinear, TiedEmbedding, convert_with_plan
from cvm_translator.quantization.calibration import compute_rounding_loss
from cvm_translator.quantization.convert import deploy
from cvm_translator.quantization.grid import compute_static_grid, fake_quantize, quantize_static


def assert_relatively_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("kind", ["float16", "int8", "int8_weights"])
@pytest.mark.parametrize("shape", [(1, 64), (7, 64), (3, 5, 64)])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_equals_what_training_saw(kind, shape, bias):
    torch.manual_seed(0)
    linear = QuantizableLinear(64, 48, bias=bias)
    linear.fake_quantization, linear.fake_format = True, LayerFormat(kind)
    values = torch.randn(shape) * 3
    with torch.no_grad():
        assert_relatively_close(deploy("a", linear, linear.fake_format)(values), linear(values))


@pytest.mark.parametrize("kind", ["float16", "int8", "int8_weights"])
def test_embedding_equals_what_training_saw(kind):
    torch.manual_seed(3)
    embedding = TiedEmbedding(50, 32)
    embedding.fake_quantization, embedding.fake_format = True, LayerFormat(kind)
    deployed = deploy("a", embedding, embedding.fake_format)
    ids, hidden = torch.tensor([[1, 2, 49], [0, 3, 3]]), torch.randn(2, 3, 32)
    with torch.no_grad():
        assert torch.equal(deployed.matrix(), embedding.matrix())
        assert torch.equal(deployed.embed(ids), embedding.embed(ids))
        assert torch.equal(deployed.embed(ids, deployed.matrix()), embedding.embed(ids))
        assert torch.equal(deployed.round_hidden(hidden), embedding.round_hidden(hidden))
        assert_relatively_close(deployed.project(hidden), embedding.project(hidden))
        assert_relatively_close(deployed.project(hidden, deployed.decoding_matrix()), embedding.project(hidden))


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("float16", {"weight": (torch.float16, (4, 6)), "bias": (torch.float32, (4,))}),
        (
            "int8",
            {
                "weight": (torch.int8, (4, 6)),
                "weight_scale": (torch.float32, (4,)),
                "bias": (torch.float32, (4,)),
            },
        ),
        (
            "int8_static",
            {
                "weight": (torch.int8, (4, 6)),
                "weight_scale": (torch.float32, (4,)),
                "input_scale": (torch.float32, ()),
                "input_zero": (torch.int8, ()),
                "bias": (torch.float32, (4,)),
            },
        ),
    ],
)
def test_state_dict_layout(kind, expected):
    state = deploy("a", QuantizableLinear(6, 4), LayerFormat(kind)).state_dict()
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in state.items()} == expected


# ------------------------------------------------------------------------------------------------- static activations


@given(st.floats(-1e3, 1e3), st.floats(-1e3, 1e3), st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=20))
@settings(max_examples=200, deadline=None)
def test_static_grid(one, other, values):
    low, high = min(one, other), max(one, other)
    number, zero = compute_static_grid(low, high)
    assert number > 0 and -128 <= zero <= 127
    values, step = torch.tensor(values), torch.tensor(number)
    restored = (quantize_static(values, step, torch.tensor(zero)).float() - zero) * step
    inside = (values >= min(low, 0.0)) & (values <= max(high, 0.0))
    assert bool(((restored - values).abs()[inside] <= step * 0.501 + 1e-30).all())
    if max(high, 0.0) - min(low, 0.0) > 1e-30:
        assert bool((restored >= min(low, 0.0) - step).all() and (restored <= max(high, 0.0) + step).all())
    assert quantize_static(torch.zeros(1), step, torch.tensor(zero)).item() == zero


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("has_kernel", [True, False])
def test_static_linear_is_the_product_of_its_rounded_inputs_and_weights(monkeypatch, bias, has_kernel):
    if not has_kernel:
        monkeypatch.setattr("cvm_translator.quantization.grid.has_exact_int_mm", lambda device_type: False)
    torch.manual_seed(0)
    linear = nn.Linear(64, 48, bias=bias)
    values = torch.randn(3, 5, 64).relu()  # one-sided, as after a ReLU: all 256 integers are for it
    model = convert_with_plan(nn.Sequential(linear), {"0": LayerFormat("int8_static")}, lambda m: m(values))
    step = values.max().item() / 255
    layer = model[0]
    rounded = layer.round_input(values)
    assert (rounded - values).abs().max() <= step  # finer than a symmetric grid would be: max / 127 / 2, and little cut
    assert_relatively_close(layer(values), functional.linear(rounded, layer.dequantized_weight(), layer.bias))
    assert (layer(values) - linear(values)).norm() < 0.02 * linear(values).norm()


def test_an_outlier_is_cut_off_where_that_loses_less():
    torch.manual_seed(0)
    linear, values = nn.Linear(64, 48), torch.randn(4096, 64)
    values[0, 0] = 8.0
    layer = convert_with_plan(linear, {"": LayerFormat("int8_static")}, lambda m: m(values))
    rounded = layer.round_input(values)
    assert rounded.max() < 7.0
    assert (rounded - values).square().mean() < compute_rounding_loss(values, values.min().item(), 8.0)


def test_static_embedding(net, calibrate, ids):
    plan = {name: LayerFormat("int8_static") for name in ("embedding", "layers.0", "layers.2")}
    converted = convert_with_plan(net, plan, calibrate)
    with torch.no_grad():
        expected = net(ids)
        assert (converted(ids) - expected).norm() < 0.03 * expected.norm()
        hidden = torch.randn(4, 64)
        embedding = converted.embedding
        assert_relatively_close(embedding.project(hidden), embedding.round_hidden(hidden) @ embedding.matrix().T)
        assert_relatively_close(embedding.project(hidden, embedding.matrix()), embedding.project(hidden))
        assert not torch.equal(embedding.round_hidden(hidden), fake_quantize(hidden))
    assert net.embedding.watch_hidden is None


def test_calibration_that_is_missing_or_no_good(net, calibrate, ids):
    plan = {name: LayerFormat("int8_static") for name in ("embedding", "layers.0", "layers.2")}
    with pytest.raises(ValueError, match="embedding is to be int8_static, which needs calibration: give `calibrate`"):
        convert_with_plan(net, plan)
    with pytest.raises(ValueError, match=r"layer layers\.0 is not reached by the calibration data"):
        convert_with_plan(net, plan, lambda m: m.embedding.project(torch.randn(2, 64)))
    with pytest.raises(ValueError, match=r"layer layers\.0 is fed NaN or infinite values"):
        convert_with_plan(net, plan, lambda m: m.layers(torch.full((2, 64), float("nan"))))
    assert not net.layers[0]._forward_pre_hooks
