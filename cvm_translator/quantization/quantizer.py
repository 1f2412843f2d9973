"""The quantisation methods that settings name: how a model is trained for a number format and deployed in it.

| method | bits | training sees | deployed as |
|---|---|---|---|
| `none` | | nothing | float32 |
| `dynamic` | 8 | nothing | int8 weights, activations quantised per token |
| `static` | 8 | nothing | int8 weights, activations on calibrated grids |
| `qat` | 8, 4 | the rounding | as `dynamic`, or as `weight_only` with 4 bits |
| `weight_only` | 4, 8, 16 | nothing | int4, int8 or float16 weights, float activations |
| `progressive` | 8, 4 | nothing at first (16 bits), then the rounding at 8, then at 4 | as `qat` |
| `mixed` | | nothing | as its plan says |

The tied embedding has the format of the linear layers; norms and biases stay float32.
"""

from __future__ import annotations

import copy
import enum
from collections.abc import Mapping
from typing import TypeVar

from torch import nn

from cvm_translator.config.schema import METHOD_BITS, PROGRESSIVE_BITS, TRAINED_METHODS
from cvm_translator.quantization.calibration import Calibrate
from cvm_translator.quantization.convert import (
    check_plan,
    convert_with_plan,
    count_bytes,
    find_layers,
    set_fake_quantization,
)
from cvm_translator.quantization.formats import FLOAT16, FLOAT32, INT8, LayerFormat, Plan

ModuleT = TypeVar("ModuleT", bound=nn.Module)


class QuantizationType(enum.Enum):
    """Quantisation methods; the value is how settings spell them."""

    NONE = "none"
    DYNAMIC = "dynamic"
    STATIC = "static"
    QAT = "qat"
    WEIGHT_ONLY = "weight_only"
    PROGRESSIVE = "progressive"
    MIXED = "mixed"


ALLOWED_BITS = {method: METHOD_BITS[method.value] for method in QuantizationType}
"""The bits that each method deploys in; none where the number of bits says nothing and is not looked at."""

TRAINED = tuple(QuantizationType(method) for method in TRAINED_METHODS)
"""Methods whose training sees the rounding."""


def check_method(method: str | QuantizationType, bits: int) -> QuantizationType:
    """The method if it exists and has the bits; ValueError names the known ones."""
    known = [kind.value for kind in QuantizationType]
    if not isinstance(method, QuantizationType):
        if method not in known:
            raise ValueError(f"quantisation method {method!r} is unknown: known are {', '.join(known)}")
        method = QuantizationType(method)
    allowed = ALLOWED_BITS[method]
    if allowed and bits not in allowed:
        raise ValueError(
            f"quantisation method {method.value} has no {bits} bits: give {' or '.join(map(str, allowed))}"
        )
    return method


class AdvancedQuantizer:
    """Prepares a model for training under a number format and converts it for deployment.

    `group_size` (None: a whole row) and `symmetric` are those of 4-bit layers; `plan` is that of method `mixed`.
    """

    def __init__(
        self,
        quantization_type: QuantizationType | str = QuantizationType.QAT,
        bits: int = 8,
        *,
        group_size: int | None = 64,
        symmetric: bool = True,
        plan: Mapping[str, object] | None = None,
    ) -> None:
        self.quantization_type = check_method(quantization_type, bits)
        self.bits = bits
        self._int4 = LayerFormat("int4", group_size, symmetric)
        if (plan is not None) != (self.quantization_type is QuantizationType.MIXED):
            raise ValueError(
                "quantisation method mixed needs a plan, such as MemoryOptimizedQuantizer makes"
                if plan is None
                else f"quantisation method {self.quantization_type.value} takes no plan: leave it out or choose mixed"
            )
        self._mixed = plan

    def find_format(self, bits: int | None = None) -> LayerFormat:
        """The format of every layer at so many bits, by default those of deployment."""
        bits = self.bits if bits is None else bits
        if self.quantization_type is QuantizationType.NONE:
            return FLOAT32
        if self.quantization_type is QuantizationType.STATIC:
            return LayerFormat("int8_static")
        if self.quantization_type is QuantizationType.WEIGHT_ONLY and bits == 8:
            return LayerFormat("int8_weights")
        return {16: FLOAT16, 8: INT8, 4: self._int4}[bits]

    def plan(self, model: nn.Module) -> Plan:
        """The deployed format of each of the model's layers."""
        if self._mixed is not None:
            return check_plan(model, self._mixed)
        return dict.fromkeys(find_layers(model), self.find_format())

    def prepare(self, model: nn.Module, on: bool = True, bits: int | None = None) -> nn.Module:
        """Switch fake quantisation on where training is to see it (`qat`, `progressive`), else off; returns the model.

        `bits` are those of now: by default the deployed ones, in progressive training 16 or 8 before them.
        """
        if self.quantization_type not in TRAINED:
            set_fake_quantization(model, False)
            return model
        if bits is not None and (bits not in PROGRESSIVE_BITS or bits < self.bits):
            steps = ", ".join(str(step) for step in PROGRESSIVE_BITS if step >= self.bits)
            raise ValueError(f"training for {self.bits} bits has no step of {bits} bits: give one of {steps}")
        set_fake_quantization(model, on, dict.fromkeys(find_layers(model), self.find_format(bits)))
        return model

    def convert(self, model: ModuleT, calibrate: Calibrate | None = None) -> ModuleT:
        """A deep copy of the model in the deployed number format, in evaluation mode.

        `static` needs `calibrate`, a function that puts calibration data through the model it is given.
        """
        if self.quantization_type is QuantizationType.STATIC and calibrate is None:
            raise ValueError(
                "quantisation method static needs calibration data: give `calibrate`, a function that puts some through"
                " the model, or choose dynamic"
            )
        return convert_with_plan(model, self.plan(model), calibrate)

    def num_bytes(self, model: nn.Module) -> int:
        """Bytes of the weights of the model in the deployed number format, as a file, see `count_bytes`."""
        empty = copy.deepcopy(model).to("meta")
        return count_bytes(convert_with_plan(empty, self.plan(empty)))
