"""Converting whole models, and choosing bits for a size."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from cvm_translator.quantization import (
    AdvancedQuantizer,
    FourBitLinear,
    Int8Linear,
    Int8TiedEmbedding,
    MemoryOptimizedQuantizer,
    QuantizableLinear,
    QuantizationType,
    TiedEmbedding,
    collect_activations,
    count_bytes,
)
from cvm_translator.quantization.memory import HalfLinear


class Net(nn.Module):
    """A small model that is no translator: the quantisers know modules, not models."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = TiedEmbedding(40, 64)
        self.layers = nn.Sequential(QuantizableLinear(64, 128), nn.ReLU(), QuantizableLinear(128, 64))
        self.norm = nn.LayerNorm(64)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.embedding.project(self.norm(self.layers(self.embedding.embed(ids))))


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net()


IDS = torch.arange(40)


def test_int8_conversion_equals_prepared_model_and_leaves_it_alone(net):
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    quantizer = AdvancedQuantizer(QuantizationType.QAT_INT8)
    assert quantizer.prepare(net) is net
    with torch.no_grad():
        expected = net(IDS)
        converted = quantizer.convert(net)
        actual = converted(IDS)
    assert (actual - expected).abs().max() < 1e-5 * expected.abs().max()
    assert isinstance(converted.layers[0], Int8Linear)
    assert isinstance(converted.embedding, Int8TiedEmbedding)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert not converted.training


def test_prepare_switches_on_and_off(net):
    with torch.no_grad():
        plain = net(IDS)
        assert not torch.equal(AdvancedQuantizer(QuantizationType.QAT_INT8).prepare(net)(IDS), plain)
        assert torch.equal(AdvancedQuantizer(QuantizationType.QAT_INT8).prepare(net, on=False)(IDS), plain)
        assert torch.equal(AdvancedQuantizer(QuantizationType.DYNAMIC_INT8).prepare(net)(IDS), plain)


@pytest.mark.parametrize("kind", list(QuantizationType))
def test_every_type_works_and_counts_its_bytes(net, kind):
    quantizer = AdvancedQuantizer(kind)
    with torch.no_grad():
        error = (quantizer.convert(net)(IDS) - net(IDS)).norm() / net(IDS).norm()
    assert error < {QuantizationType.NONE: 1e-9, QuantizationType.WEIGHT_ONLY_INT4: 0.2}.get(kind, 0.02)
    weights, rest = 64 * 128 * 2, 4 * (128 + 64) + 2 * 4 * 64  # of the linear layers; biases and norm
    rows = 40 * 64 + 40 * 4
    expected = {
        QuantizationType.NONE: 4 * (40 * 64 + weights) + rest,
        QuantizationType.DYNAMIC_INT8: rows + weights + 4 * (128 + 64) + rest,
        QuantizationType.QAT_INT8: rows + weights + 4 * (128 + 64) + rest,
        QuantizationType.WEIGHT_ONLY_INT4: rows + weights // 2 + 4 * (128 + 2 * 64) + rest,
    }
    assert quantizer.num_bytes(net) == expected[kind]


def test_shared_modules_stay_shared(net):
    net.again = net.layers[0]
    converted = AdvancedQuantizer().convert(net)
    assert converted.again is converted.layers[0]
    assert count_bytes(converted) == AdvancedQuantizer().num_bytes(net)


@pytest.mark.parametrize("with_activations", [False, True])
@pytest.mark.parametrize("ratio", [2.0, 3.5, 4.5])
def test_memory_plan_meets_its_target_with_few_bits_spent(net, ratio, with_activations):
    activations = collect_activations(net, lambda: net(IDS)) if with_activations else None
    quantizer = MemoryOptimizedQuantizer(target_compression_ratio=ratio)
    plan = quantizer.plan(net, activations)
    assert plan["target_met"]
    assert plan["compression_ratio"] >= ratio
    converted = quantizer.convert(net, plan)
    assert count_bytes(converted) == plan["num_bytes"]
    kinds = {16: HalfLinear, 8: Int8Linear, 4: FourBitLinear}
    for name, layer in plan["layers"].items():
        assert isinstance(converted.get_submodule(name), kinds[layer["bits"]])
    with torch.no_grad():
        assert (converted(IDS) - net(IDS)).norm() < 0.2 * net(IDS).norm()


def test_memory_plan_spares_the_sensitive_layer(net):
    with torch.no_grad():
        net.layers[0].weight[:, 0] = 5.0  # an outlier in each row makes the steps of its group coarse,
        net.embedding.weight[:, 0] = 0.0  # and no input makes use of it
    plan = MemoryOptimizedQuantizer(3.8).plan(net, collect_activations(net, lambda: net(IDS)))
    assert {name: layer["bits"] for name, layer in plan["layers"].items()} == {"layers.0": 8, "layers.2": 4}


def test_memory_plan_says_when_the_target_is_out_of_reach(net):
    plan = MemoryOptimizedQuantizer(100.0).plan(net)
    assert not plan["target_met"]
    assert "cannot be met" in plan["message"]
    assert {layer["bits"] for layer in plan["layers"].values()} == {4}


def test_bad_memory_settings_are_refused(net):
    with pytest.raises(ValueError, match="target_compression_ratio"):
        MemoryOptimizedQuantizer(0.5)
    with pytest.raises(ValueError, match=r"layers\.0"):
        MemoryOptimizedQuantizer(4.0).plan(net, {})
