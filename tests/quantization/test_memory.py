"""Choosing formats for a size: targets met, sensitive layers spared, the least loss, and what is refused."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cvm_translator.quantization import (
    AdvancedQuantizer,
    LayerFormat,
    MemoryOptimizedQuantizer,
    check_plan,
    convert_with_plan,
    count_bytes,
    describe_plan,
    find_plan,
    parse_plan,
)
from cvm_translator.quantization.memory import OPTIONS, LayerOption, choose_options, compute_divergence, measure_layers


@pytest.mark.parametrize("ratio", [1.0, 2.0, 3.5, 4.5])
def test_the_plan_meets_its_target_and_is_used_again(net, calibrate, ids, ratio):
    quantizer = MemoryOptimizedQuantizer(ratio)
    result = json.loads(json.dumps(quantizer.plan(net, calibrate)))
    assert result["target_met"]
    assert result["compression_ratio"] >= ratio
    converted = quantizer.convert(net, result)
    assert count_bytes(converted) == result["num_bytes"] <= result["target_bytes"]
    assert find_plan(converted) == check_plan(net, result["plan"])
    assert set(find_plan(net).values()) == {LayerFormat()}
    with torch.no_grad():
        loss = compute_divergence(net(ids), converted(ids))
    assert loss == pytest.approx(result["loss_nats_per_token"], rel=1e-3, abs=1e-9)
    edited = result["plan"] | {"layers.0": {"kind": "float32"}}
    assert find_plan(convert_with_plan(net, edited))["layers.0"] == LayerFormat()


def test_a_given_plan_is_described_by_its_own_size(net, calibrate):
    planned = MemoryOptimizedQuantizer(4.5).plan(net, calibrate)
    described = describe_plan(net, parse_plan(planned["plan"]))
    assert described == {name: planned[name] for name in described}
    edited = parse_plan(planned["plan"]) | {"layers.0": LayerFormat()}
    described = describe_plan(net, edited)
    assert described["num_bytes"] == count_bytes(convert_with_plan(net, edited)) > planned["num_bytes"]
    ratio = described["float_bytes"] / described["num_bytes"]
    assert described["message"] == f"{ratio:.2f} times smaller, {described['num_bytes']:,} bytes"
    assert parse_plan(described["plan"]) == edited
    with pytest.raises(ValueError, match="the plan lacks layer embedding"):
        describe_plan(net, {"layers.0": LayerFormat(), "layers.2": LayerFormat()})


def test_modes_of_the_model_change_nothing(net, calibrate):
    expected = MemoryOptimizedQuantizer(4.0).plan(net, calibrate)
    AdvancedQuantizer("qat", 4).prepare(net.train())
    assert MemoryOptimizedQuantizer(4.0).plan(net, calibrate) == expected
    assert net.training and net.embedding.fake_quantization


def test_megabytes_are_another_way_to_say_it(net, calibrate):
    ratio = MemoryOptimizedQuantizer(4.0).plan(net, calibrate)
    megabytes = MemoryOptimizedQuantizer(target_megabytes=ratio["target_bytes"] / 1e6).plan(net, calibrate)
    assert megabytes == ratio


def test_losses_are_those_of_one_layer_alone(net, calibrate, ids):
    measured = measure_layers(net, calibrate)
    with torch.no_grad():
        for name, options in measured.items():
            for option in options:
                plan = find_plan(net) | {name: option.layer_format}
                expected = compute_divergence(net(ids), convert_with_plan(net, plan)(ids))
                assert option.loss == pytest.approx(expected, rel=1e-3, abs=1e-9)
        assert [option.layer_format for option in measured["layers.0"]] == list(OPTIONS)


def test_the_sensitive_layer_is_spared(net, calibrate):
    with torch.no_grad():
        net.layers[0].weight[:, ::8] *= 30.0  # outliers make the steps of their groups coarse,
        net.embedding.weight[:, ::8] = 0.0  # and no input makes use of them
    result = MemoryOptimizedQuantizer(4.5).plan(net, calibrate)
    bits = {name: layer["bits"] for name, layer in result["layers"].items()}
    assert bits["layers.0"] > bits["layers.2"]


def test_it_loses_less_than_a_uniform_plan_of_the_same_size(net, calibrate, ids):
    for size in (16, 32, 64):
        uniform = AdvancedQuantizer("weight_only", 4, group_size=size).convert(net)
        result = MemoryOptimizedQuantizer(target_megabytes=count_bytes(uniform) / 1e6).plan(net, calibrate)
        assert result["num_bytes"] <= count_bytes(uniform)
        with torch.no_grad():
            assert result["loss_nats_per_token"] <= compute_divergence(net(ids), uniform(ids)) * 1.02


def test_out_of_reach_is_said_with_the_best_that_can_be_done(net, calibrate):
    result = MemoryOptimizedQuantizer(100.0).plan(net, calibrate)
    assert not result["target_met"]
    assert "is out of reach, this is the smallest" in result["message"]
    assert result["message"].startswith(f"{result['compression_ratio']:.2f} times smaller")
    assert {layer["bits"] for layer in result["layers"].values()} == {4}
    assert result["compression_ratio"] > 4.5


def test_a_layer_that_an_option_cannot_hold_takes_another(net, calibrate):
    with torch.no_grad():
        net.layers[0].weight[0, 0] = 70_000.0
    result = MemoryOptimizedQuantizer(1.0).plan(net, calibrate)
    assert result["layers"]["layers.0"]["bits"] in (8, 4)
    with pytest.raises(ValueError, match=r"layer layers\.0: a weight is too large for float16"):
        MemoryOptimizedQuantizer(2.0, options=[LayerFormat("float16")]).plan(net, calibrate)


def test_bad_settings_models_and_data_are_refused(net, calibrate):
    with pytest.raises(ValueError, match="either target_compression_ratio or target_megabytes"):
        MemoryOptimizedQuantizer()
    with pytest.raises(ValueError, match="either target_compression_ratio or target_megabytes"):
        MemoryOptimizedQuantizer(2.0, target_megabytes=1.0)
    for ratio in (0.5, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"target_compression_ratio {ratio} must be at least 1"):
            MemoryOptimizedQuantizer(ratio)
    with pytest.raises(ValueError, match="target_megabytes 0 must be positive"):
        MemoryOptimizedQuantizer(target_megabytes=0)
    with pytest.raises(ValueError, match="at least one number format"):
        MemoryOptimizedQuantizer(2.0, options=[])
    with pytest.raises(ValueError, match="is int8 already: give the float model"):
        MemoryOptimizedQuantizer(2.0).plan(AdvancedQuantizer("dynamic").convert(net), calibrate)
    with pytest.raises(ValueError, match="logits on the calibration data are NaN or infinite"):
        MemoryOptimizedQuantizer(2.0).plan(net, lambda model: torch.full((3, 4), float("nan")))
    with pytest.raises(ValueError, match="calibration gave logits"):
        MemoryOptimizedQuantizer(2.0).plan(net, lambda model: torch.empty(0, 40))
    with torch.no_grad():
        net.layers[2].weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinite"):
        MemoryOptimizedQuantizer(2.0).plan(net, calibrate)


options = st.lists(st.tuples(st.integers(1, 30), st.floats(0, 10)), min_size=1, max_size=4)


@given(st.lists(options, min_size=1, max_size=5), st.integers(1, 120))
@settings(max_examples=200, deadline=None)
def test_the_choice_is_the_best_of_all(layers, budget):
    layers = [[LayerOption(LayerFormat(), size, loss) for size, loss in layer] for layer in layers]
    fitting = [c for c in itertools.product(*layers) if sum(o.num_bytes for o in c) <= budget]
    picks = choose_options(layers, budget)
    assert (picks is None) == (not fitting)
    if picks is not None:
        chosen = [layer[i] for layer, i in zip(layers, picks, strict=True)]
        assert sum(o.num_bytes for o in chosen) <= budget
        assert sum(o.loss for o in chosen) == pytest.approx(min(sum(o.loss for o in c) for c in fitting))


def test_divergence_is_that_of_the_definition():
    torch.manual_seed(0)
    one, other = torch.randn(700, 11), torch.randn(700, 11)
    expected = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=one), torch.distributions.Categorical(logits=other)
    ).mean()
    assert compute_divergence(one, other) == pytest.approx(expected.item(), rel=1e-5)
    assert compute_divergence(one, one) == 0.0
