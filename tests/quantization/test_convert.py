"""Plans applied to whole models, found in them, checked, and the bytes of the files they make."""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from cvm_translator.config import load_config
from cvm_translator.config.schema import QuantizationConfig
from cvm_translator.models.transformer import CvmTransformer
from cvm_translator.quantization import (
    AdvancedQuantizer,
    FourBitLinear,
    LayerFormat,
    check_plan,
    convert_with_plan,
    count_bytes,
    find_fake_plan,
    find_plan,
    set_fake_quantization,
)
from cvm_translator.quantization.convert import DEPLOYED, find_layers
from cvm_translator.quantization.formats import FLOAT32, KINDS

PLAN = {"embedding": LayerFormat("int4", 32), "layers.0": LayerFormat("int8"), "layers.2": LayerFormat()}


def test_every_kind_has_its_deployed_form():
    assert {"float32", *DEPLOYED} == set(KINDS)


def test_a_plan_is_applied_layer_by_layer_and_found_again(net, ids):
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    converted = convert_with_plan(net.train(), PLAN)
    assert find_plan(converted) == PLAN
    assert set(find_plan(net).values()) == {FLOAT32}
    assert list(find_layers(converted)) == list(find_layers(net))
    assert not converted.training and net.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    with torch.no_grad():
        assert (converted(ids) - net(ids)).norm() < 0.2 * net(ids).norm()


def test_fake_quantisation_follows_a_plan_and_the_converted_model_follows_it(net, ids):
    set_fake_quantization(net, True, PLAN)
    assert find_fake_plan(net) == PLAN
    assert set(find_plan(net).values()) == {FLOAT32}
    with torch.no_grad():
        expected, actual = net(ids), convert_with_plan(net, find_fake_plan(net))(ids)
        assert (actual - expected).abs().max() < 1e-5 * expected.abs().max()
    set_fake_quantization(net, False)
    assert set(find_fake_plan(net).values()) == {FLOAT32}
    set_fake_quantization(net, True)
    assert find_fake_plan(net) == PLAN  # the formats stay
    with pytest.raises(ValueError, match=r"layer layers\.0: training cannot see int8_static"):
        set_fake_quantization(net, True, PLAN | {"layers.0": LayerFormat("int8_static")})


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({}, "the plan lacks layer"),
        (
            {name: f for name, f in PLAN.items() if name != "layers.2"},
            r"the plan lacks layer layers\.2: add its format",
        ),
        (PLAN | {"layers.3": FLOAT32}, r"layer 'layers\.3', which the model does not have: did you mean layers\.\d"),
        (PLAN | {"q": FLOAT32}, r"layer 'q', which the model does not have: it has embedding, layers\.0, layers\.2"),
        (PLAN | {"layers.0": {"kind": "int5"}}, r"layer 'layers\.0': kind 'int5' is no number format"),
        ([], "a plan maps each layer's name"),
    ],
)
def test_plans_that_do_not_fit(net, plan, message):
    for use in (check_plan, convert_with_plan):
        with pytest.raises(ValueError, match=message):
            use(net, plan)


def test_quantised_models_are_not_quantised_again(net):
    with pytest.raises(ValueError, match=r"layer embedding is int4 in groups of 32 already: give the float model"):
        convert_with_plan(convert_with_plan(net, PLAN), PLAN)


@pytest.mark.parametrize("kind", DEPLOYED)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_weights_are_refused_with_the_layer(net, kind, bad, calibrate):
    with torch.no_grad():
        net.layers[2].weight[3, 5] = bad
    with pytest.raises(ValueError, match=r"^layer layers\.2: the weights are NaN or infinite: use an earlier"):
        convert_with_plan(net, dict.fromkeys(PLAN, LayerFormat(kind)), calibrate)


def test_bad_biases_are_refused_too(net):
    with torch.no_grad():
        net.layers[0].bias[3] = float("nan")
    with pytest.raises(ValueError, match=r"^layer layers\.0: the weights are NaN"):
        convert_with_plan(net, PLAN)


@pytest.mark.parametrize(("kind", "value"), [("float16", 70_000.0), ("int4", 500_000.0)])
def test_weights_that_a_format_cannot_hold(net, kind, value):
    with torch.no_grad():
        net.layers[0].weight[3, 5] = value
    with pytest.raises(ValueError, match=r"^layer layers\.0: a weight is too large for .*: use int8 or float32"):
        convert_with_plan(net, dict.fromkeys(PLAN, LayerFormat(kind)))


@pytest.mark.parametrize("kind", DEPLOYED)
def test_rows_of_zeros_and_outliers(net, kind, calibrate, ids):
    with torch.no_grad():
        net.layers[0].weight[3].zero_()
        net.layers[0].weight[4, 7] = 50.0
        net.layers[2].weight.zero_()
        converted = convert_with_plan(net, dict.fromkeys(PLAN, LayerFormat(kind)), calibrate)
        assert not converted.layers[0].dequantized_weight()[3].any()
        assert converted.layers[0].dequantized_weight()[4, 7] == pytest.approx(50.0, rel=0.01)
        assert not converted.layers[2].dequantized_weight().any()
        assert bool(converted(ids).isfinite().all())


def test_shared_layers_stay_shared(net):
    net.again = net.layers[0]
    net.layers.append(net.layers[0])
    converted = convert_with_plan(net, PLAN)
    assert converted.again is converted.layers[0] is converted.layers[3]
    del net.again, net.layers[3]
    assert count_bytes(converted) == count_bytes(convert_with_plan(net, PLAN))


@pytest.mark.parametrize(
    "layer_format", [LayerFormat(kind) for kind in KINDS] + [LayerFormat("int4", 16, False)], ids=str
)
def test_bytes_are_those_of_the_file_and_need_no_numbers(net, layer_format, calibrate):
    plan = dict.fromkeys(PLAN, layer_format)
    converted = convert_with_plan(net, plan, calibrate)
    assert count_bytes(converted) == len(safetensors.torch.save(dict(converted.state_dict())))
    with torch.device("meta"):
        empty = type(net)()
    assert count_bytes(convert_with_plan(empty, plan)) == count_bytes(converted)


@pytest.fixture(scope="module")
def small_student() -> tuple[QuantizationConfig, CvmTransformer]:
    """The student of configs/cvm_small.yaml without numbers, and how it is quantised."""
    config = load_config(Path(__file__).parents[2] / "configs" / "cvm_small.yaml")
    with torch.device("meta"):
        return config.quantization, CvmTransformer(config.student.model, config.tokenizer.vocab_size)


@pytest.mark.parametrize(
    ("quantizer", "share"),
    [
        (AdvancedQuantizer("weight_only", 4, group_size=None), 1 / 7.5),
        (AdvancedQuantizer("qat", 8), 0.27),
        (AdvancedQuantizer("static", 8), 0.27),
        (AdvancedQuantizer("weight_only", 16), 0.51),
    ],
)
def test_share_of_the_float_file(quantizer, share, small_student):
    _, model = small_student
    assert quantizer.num_bytes(model) <= share * count_bytes(model)


def test_four_bits_on_the_config_s_own_grid_are_a_seventh(small_student):
    quantization, model = small_student
    assert isinstance(quantization.group_size, int)
    grid = {"group_size": quantization.group_size, "symmetric": quantization.symmetric}
    assert AdvancedQuantizer("qat", 4, **grid).num_bytes(model) <= count_bytes(model) / 7


def test_a_single_layer_is_a_model():
    linear = nn.Linear(64, 8)
    assert isinstance(convert_with_plan(linear, {"": LayerFormat("int4", 32)}), FourBitLinear)
