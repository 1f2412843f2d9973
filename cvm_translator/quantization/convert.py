"""From a float model to its deployed form and back to a description: plans applied, found and checked.

Works on any `nn.Module` that holds `nn.Linear` (or `QuantizableLinear`) and `TiedEmbedding` modules; these are its
*layers*, each named as in `named_modules` and, where it is shared, once. `convert_with_plan` never changes the model it
is given, and refuses, with the layer's name, what no grid can hold. A model on the meta device becomes the empty
modules that stored weights can fill.
"""

from __future__ import annotations

import copy
import difflib
import json
from collections.abc import Mapping
from typing import TypeVar, cast

import torch
from torch import nn

from cvm_translator.quantization.calibration import Calibrate, find_input_ranges
from cvm_translator.quantization.deployed import (
    DeployedLinear,
    HalfLinear,
    HalfTiedEmbedding,
    Int8Linear,
    Int8StaticLinear,
    Int8StaticTiedEmbedding,
    Int8TiedEmbedding,
    Int8WeightLinear,
    Int8WeightTiedEmbedding,
    check_weight,
)
from cvm_translator.quantization.formats import FLOAT32, LayerFormat, Plan, errors_of, parse_plan
from cvm_translator.quantization.four_bit import FourBitLinear, FourBitTiedEmbedding
from cvm_translator.quantization.linear import FAKE_WEIGHTS, QuantizableLinear, TiedEmbedding

ModuleT = TypeVar("ModuleT", bound=nn.Module)

DEPLOYED: dict[str, tuple[type[DeployedLinear], type[DeployedLinear]]] = {
    "float16": (HalfLinear, HalfTiedEmbedding),
    "int8": (Int8Linear, Int8TiedEmbedding),
    "int8_static": (Int8StaticLinear, Int8StaticTiedEmbedding),
    "int8_weights": (Int8WeightLinear, Int8WeightTiedEmbedding),
    "int4": (FourBitLinear, FourBitTiedEmbedding),
}
"""What becomes of a linear layer and of a tied embedding; float32 layers stay what they are."""


_TYPE_NAMES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.int64: "I64",
}
_TYPES = list(_TYPE_NAMES)


def find_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Every linear layer and tied embedding of the model, float or deployed, by name."""
    kinds = (nn.Linear, TiedEmbedding, DeployedLinear)
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}


def find_plan(model: nn.Module) -> Plan:
    """The formats that the model's layers are stored in; float32 for those that are trainable."""
    plan: Plan = {}
    for name, layer in find_layers(model).items():
        plan[name] = layer.layer_format if isinstance(layer, DeployedLinear) else FLOAT32
    return plan


def find_fake_plan(model: nn.Module) -> Plan:
    """The formats that the model's layers are rounded to as they compute; float32 for those that are not."""
    plan = dict.fromkeys(find_layers(model), FLOAT32)
    fake = {name: layer.fake_format for name, layer in _find_trainable(model).items() if layer.fake_quantization}
    return plan | fake


def _find_trainable(model: nn.Module) -> dict[str, QuantizableLinear | TiedEmbedding]:
    layers = find_layers(model).items()
    return {name: layer for name, layer in layers if isinstance(layer, QuantizableLinear | TiedEmbedding)}


def check_plan(model: nn.Module, plan: object) -> Plan:
    """The plan, parsed, if it names each layer of the model and nothing else; ValueError names what is wrong."""
    parsed, layers = parse_plan(plan), find_layers(model)
    for name in parsed.keys() - layers.keys():
        near = difflib.get_close_matches(name, layers, 1)
        hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(list(layers)[:3])}, …"
        raise ValueError(f"the plan names layer {name[:100]!r}, which the model does not have: {hint}")
    for name in layers.keys() - parsed.keys():
        raise ValueError(f"the plan lacks layer {name}: add its format, such as {{kind: int8}}")
    return {name: parsed[name] for name in layers}


def set_fake_quantization(model: nn.Module, on: bool, plan: Mapping[str, LayerFormat] | None = None) -> None:
    """Switch the rounding of every layer that training sees rounded; with a plan, also to which formats."""
    trainable = _find_trainable(model)
    if plan is not None:
        plan = check_plan(model, plan)
        for name, layer in trainable.items():
            if plan[name].kind not in FAKE_WEIGHTS:
                raise ValueError(f"layer {name}: training cannot see {plan[name]}: known are {', '.join(FAKE_WEIGHTS)}")
            layer.fake_format = plan[name]
    for layer in trainable.values():
        layer.fake_quantization = on


def convert_with_plan(
    model: ModuleT, plan: Mapping[str, LayerFormat] | Mapping[str, object], calibrate: Calibrate | None = None
) -> ModuleT:
    """A deep copy of the model with each layer in its format of the plan, in evaluation mode.

    `calibrate` puts data through the float model that it is given; `int8_static` layers need it.
    """
    for name, layer in find_layers(model).items():
        if isinstance(layer, DeployedLinear):
            raise ValueError(f"layer {name} is {layer.layer_format} already: give the float model")
    parsed = check_plan(model, plan)
    converted = copy.deepcopy(model).eval()
    set_fake_quantization(converted, False)
    layers = find_layers(converted)
    deployed = {id(layer): deploy(name, layer, parsed[name]) for name, layer in layers.items()}
    static = {name: layer for name, layer in layers.items() if isinstance(deployed[id(layer)], Int8StaticLinear)}
    if static and not any(layer.weight.is_meta for layer in static.values()):
        if calibrate is None:
            raise ValueError(
                f"{next(iter(static))} is to be int8_static, which needs calibration: give `calibrate`, a function that"
                " puts calibration data through the model"
            )
        for name, (low, high) in find_input_ranges(converted, static, calibrate).items():
            layer = deployed[id(static[name])]
            assert isinstance(layer, Int8StaticLinear)
            layer.set_input_range(low, high)
    replace_layers(converted, deployed)
    return cast(ModuleT, deployed.get(id(converted), converted))


def replace_layers(model: nn.Module, replacements: Mapping[int, nn.Module]) -> None:
    """Exchange layers of the model, given by `id`, wherever they appear in it."""
    for parent in list(model.modules()):
        for child_name, child in list(parent._modules.items()):
            if id(child) in replacements:
                setattr(parent, child_name, replacements[id(child)])


def deploy(name: str, layer: nn.Module, layer_format: LayerFormat) -> nn.Module:
    """A float layer in its deployed form; a static one still lacks its input range."""
    if layer_format.kind == "float32":
        return layer
    for_linear, for_embedding = DEPLOYED[layer_format.kind]
    with errors_of(name):
        if isinstance(layer, TiedEmbedding):
            return for_embedding.from_weight(layer.weight, None, layer_format).eval()
        assert isinstance(layer, nn.Linear)
        if layer.bias is not None:
            check_weight(layer.bias)
        return for_linear.from_weight(layer.weight, layer.bias, layer_format).eval()


def count_bytes(model: nn.Module) -> int:
    """Bytes of the model's weights as a safetensors file, each shared tensor counted once; works on the meta device."""
    tensors: dict[int, tuple[str, torch.Tensor]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        tensors.setdefault(id(tensor), (name, tensor))
    num_bytes, header = 0, {}
    # The file's order, which decides how many digits the places have: wide types first, then by name.
    for name, tensor in sorted(tensors.values(), key=lambda entry: (-_TYPES.index(entry[1].dtype), entry[0])):
        end = num_bytes + tensor.numel() * tensor.element_size()
        dtype = _TYPE_NAMES[tensor.dtype]
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [num_bytes, end]}
        num_bytes = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    return 8 + len(text) + -len(text) % 8 + num_bytes
