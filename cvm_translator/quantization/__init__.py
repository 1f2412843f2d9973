"""Number formats: grids, fake quantisation with straight-through gradients, deployed layers, plans for models."""

from cvm_translator.quantization.convert import (
    check_plan,
    convert_with_plan,
    count_bytes,
    find_fake_plan,
    find_plan,
    set_fake_quantization,
)
from cvm_translator.quantization.formats import LayerFormat, Plan, name_plan, parse_plan, plan_to_plain
from cvm_translator.quantization.four_bit import FourBitLinear
from cvm_translator.quantization.linear import QuantizableLinear, TiedEmbedding, look_up
from cvm_translator.quantization.memory import MemoryOptimizedQuantizer, describe_plan
from cvm_translator.quantization.quantizer import ALLOWED_BITS, AdvancedQuantizer, QuantizationType, check_method

__all__ = [
    "ALLOWED_BITS",
    "AdvancedQuantizer",
    "FourBitLinear",
    "LayerFormat",
    "MemoryOptimizedQuantizer",
    "Plan",
    "QuantizableLinear",
    "QuantizationType",
    "TiedEmbedding",
    "check_method",
    "check_plan",
    "convert_with_plan",
    "count_bytes",
    "describe_plan",
    "find_fake_plan",
    "find_plan",
    "look_up",
    "name_plan",
    "parse_plan",
    "plan_to_plain",
    "set_fake_quantization",
]
