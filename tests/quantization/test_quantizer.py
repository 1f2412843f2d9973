"""Methods by name: what each lets training see, deploys, and refuses."""

from __future__ import annotations

import pytest
import torch

from cvm_translator.quantization import (
    ALLOWED_BITS,
    AdvancedQuantizer,
    FourBitLinear,
    LayerFormat,
    QuantizationType,
    check_method,
    count_bytes,
    find_fake_plan,
    find_plan,
    name_plan,
)

METHODS = [
    ("none", 8, "float32"),
    ("dynamic", 8, "int8"),
    ("static", 8, "int8_static"),
    ("qat", 8, "int8"),
    ("qat", 4, "int4"),
    ("weight_only", 16, "float16"),
    ("weight_only", 8, "int8_weights"),
    ("weight_only", 4, "int4"),
    ("progressive", 8, "int8"),
    ("progressive", 4, "int4"),
]


@pytest.mark.parametrize(("method", "bits", "kind"), METHODS)
def test_every_method_deploys_near_the_float_model(net, method, bits, kind, calibrate, ids):
    quantizer = AdvancedQuantizer(QuantizationType(method), bits)
    converted = quantizer.convert(net, calibrate)
    assert name_plan(find_plan(converted)) == name_plan(quantizer.plan(net)) == kind
    with torch.no_grad():
        error = (converted(ids) - net(ids)).norm() / net(ids).norm()
    assert error < {32: 1e-9, 16: 1e-3, 8: 0.03, 4: 0.2}[LayerFormat(kind).bits]
    assert (error == 0) == (kind == "float32")
    assert quantizer.num_bytes(net) == count_bytes(converted)


@pytest.mark.parametrize(("method", "bits", "kind"), METHODS)
def test_training_sees_the_rounding_of_trained_methods_only(net, method, bits, kind, ids):
    quantizer = AdvancedQuantizer(method, bits)
    with torch.no_grad():
        plain = net(ids)
        assert quantizer.prepare(net) is net
        assert torch.equal(net(ids), plain) == (method not in ("qat", "progressive"))
        if method in ("qat", "progressive"):
            expected, actual = net(ids), quantizer.convert(net)(ids)
            tolerance = 1e-5 if bits == 8 else 0.01  # the 4-bit kernel takes bfloat16
            assert (actual - expected).abs().max() < tolerance * expected.abs().max()
        assert torch.equal(quantizer.prepare(net, on=False)(ids), plain)


def test_progressive_training_steps_down(net):
    quantizer = AdvancedQuantizer("progressive", 4, group_size=32)
    kinds = [name_plan(find_fake_plan(quantizer.prepare(net, bits=bits))) for bits in (16, 8, 4)]
    assert kinds == ["float16", "int8", "int4"]
    assert set(find_fake_plan(quantizer.prepare(net)).values()) == {LayerFormat("int4", 32)}
    assert name_plan(find_plan(quantizer.convert(net))) == "int4"
    with pytest.raises(ValueError, match="training for 8 bits has no step of 4 bits: give one of 16, 8"):
        AdvancedQuantizer("progressive", 8).prepare(net, bits=4)


def test_group_size_and_grid_are_those_of_four_bit_layers(net):
    converted = AdvancedQuantizer("weight_only", 4, group_size=16, symmetric=False).convert(net)
    assert set(find_plan(converted).values()) == {LayerFormat("int4", 16, symmetric=False)}
    assert isinstance(converted.layers[0], FourBitLinear)
    assert AdvancedQuantizer("qat", 8, group_size=16).plan(net)["layers.0"] == LayerFormat("int8")


def test_mixed_takes_a_plan_and_nothing_else_does(net):
    plan = {name: {"kind": "int8"} for name in find_plan(net)} | {"embedding": {"kind": "int4", "group_size": 32}}
    quantizer = AdvancedQuantizer("mixed", plan=plan)
    assert find_plan(quantizer.convert(net))["embedding"] == LayerFormat("int4", 32)
    with pytest.raises(ValueError, match="mixed needs a plan"):
        AdvancedQuantizer("mixed")
    with pytest.raises(ValueError, match="qat takes no plan: leave it out or choose mixed"):
        AdvancedQuantizer("qat", plan=plan)
    with pytest.raises(ValueError, match="the plan lacks layer embedding"):
        AdvancedQuantizer("mixed", plan={"layers.0": {"kind": "int8"}, "layers.2": {"kind": "int8"}}).convert(net)


def test_known_methods_and_bits():
    assert set(ALLOWED_BITS) == set(QuantizationType)
    assert {method for method, _, _ in METHODS} | {"mixed"} == {kind.value for kind in QuantizationType}
    assert check_method("qat", 4) is check_method(QuantizationType.QAT, 4) is QuantizationType.QAT
    with pytest.raises(ValueError, match="method 'gptq' is unknown: known are none, dynamic, static, qat, weight_only"):
        check_method("gptq", 4)
    for method, bits, allowed in [
        ("dynamic", 4, "8"),
        ("static", 16, "8"),
        ("qat", 16, "8 or 4"),
        ("weight_only", 2, "4 or 8 or 16"),
        ("progressive", 16, "8 or 4"),
    ]:
        with pytest.raises(ValueError, match=f"{method} has no {bits} bits: give {allowed}$"):
            AdvancedQuantizer(method, bits)
    with pytest.raises(ValueError, match="group_size 3"):
        AdvancedQuantizer("qat", 4, group_size=3)


def test_static_without_data_is_refused(net):
    with pytest.raises(ValueError, match="static needs calibration data: give `calibrate`"):
        AdvancedQuantizer("static").convert(net)
