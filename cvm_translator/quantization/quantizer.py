"""Choosing how a model's numbers are stored: fake quantisation for training, integer modules for deployment.

Works on any `nn.Module` that holds `QuantizableLinear` (or plain `nn.Linear`) and `TiedEmbedding` modules. `convert`
never changes the model it is given.
"""

from __future__ import annotations

import copy
import enum
from collections.abc import Callable
from typing import TypeVar, cast

from torch import nn

from cvm_translator.quantization.four_bit import FourBitLinear
from cvm_translator.quantization.linear import Int8Linear, Int8TiedEmbedding, QuantizableLinear, TiedEmbedding

ModuleT = TypeVar("ModuleT", bound=nn.Module)


class QuantizationType(enum.Enum):
    """Number formats of a deployed model; the value is how settings spell it."""

    NONE = "none"
    DYNAMIC_INT8 = "dynamic"
    """int8 weights and embedding, activations quantised per token as they come; training knows nothing of it."""
    QAT_INT8 = "qat"
    """The same files and the same arithmetic, after training that saw the rounding."""
    WEIGHT_ONLY_INT4 = "int4"
    """Linear layers packed two weights a byte with a scale per group; float activations, int8 embedding rows."""


def set_fake_quantization(model: nn.Module, on: bool) -> None:
    """Switch the rounding of every quantisable module of the model."""
    for module in model.modules():
        if isinstance(module, QuantizableLinear | TiedEmbedding):
            module.fake_quantization = on


def replace_modules(model: nn.Module, replace: Callable[[str, nn.Module], nn.Module | None]) -> nn.Module:
    """A copy of the model in which each module for which `replace(name, module)` returns another one is exchanged.

    Modules that appear in several places are exchanged once and stay shared.
    """
    model = copy.deepcopy(model)
    done: dict[int, nn.Module] = {}
    for name, parent in list(model.named_modules()):
        for child_name, child in list(parent.named_children()):
            if id(child) not in done:
                new = replace(f"{name}.{child_name}" if name else child_name, child)
                done[id(child)] = child if new is None else new
            setattr(parent, child_name, done[id(child)])
    return model


def _to_int8(name: str, module: nn.Module) -> nn.Module | None:
    if isinstance(module, TiedEmbedding):
        return Int8TiedEmbedding.from_embedding(module)
    return Int8Linear.from_linear(module) if isinstance(module, nn.Linear) else None


def _to_int4(name: str, module: nn.Module) -> nn.Module | None:
    if isinstance(module, TiedEmbedding):
        return Int8TiedEmbedding.from_embedding(module)
    return FourBitLinear.from_linear(module) if isinstance(module, nn.Linear) else None


_CONVERTERS: dict[QuantizationType, Callable[[str, nn.Module], nn.Module | None] | None] = {
    QuantizationType.NONE: None,
    QuantizationType.DYNAMIC_INT8: _to_int8,
    QuantizationType.QAT_INT8: _to_int8,
    QuantizationType.WEIGHT_ONLY_INT4: _to_int4,
}


class AdvancedQuantizer:
    """Prepares a model for training under a number format and converts it for deployment."""

    def __init__(self, quantization_type: QuantizationType = QuantizationType.QAT_INT8) -> None:
        self.quantization_type = quantization_type

    def prepare(self, model: nn.Module, on: bool = True) -> nn.Module:
        """Switch fake quantisation on where training is to see it (QAT_INT8), off otherwise; returns the same model."""
        set_fake_quantization(model, on and self.quantization_type is QuantizationType.QAT_INT8)
        return model

    def convert(self, model: ModuleT) -> ModuleT:
        """A deep copy of the model in the deployed number format, in evaluation mode."""
        replace = _CONVERTERS[self.quantization_type]
        converted = copy.deepcopy(model) if replace is None else cast(ModuleT, replace_modules(model, replace))
        set_fake_quantization(converted, False)
        return converted.eval()

    def num_bytes(self, model: nn.Module) -> int:
        """Bytes of the weights of the model in the deployed number format, each shared tensor counted once."""
        return count_bytes(self.convert(model))


def count_bytes(model: nn.Module) -> int:
    """Bytes of the tensors in the model's state_dict, each shared tensor counted once."""
    tensors = {tensor.data_ptr(): tensor for tensor in model.state_dict().values()}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
