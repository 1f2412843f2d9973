"""Number formats: the 8-bit grid, fake quantisation with straight-through gradients, integer modules, 4-bit packing."""

from cvm_translator.quantization.four_bit import FourBitLinear
from cvm_translator.quantization.linear import Int8Linear, Int8TiedEmbedding, QuantizableLinear, TiedEmbedding
from cvm_translator.quantization.memory import MemoryOptimizedQuantizer, collect_activations
from cvm_translator.quantization.quantizer import (
    AdvancedQuantizer,
    QuantizationType,
    count_bytes,
    set_fake_quantization,
)

__all__ = [
    "AdvancedQuantizer",
    "FourBitLinear",
    "Int8Linear",
    "Int8TiedEmbedding",
    "MemoryOptimizedQuantizer",
    "QuantizableLinear",
    "QuantizationType",
    "TiedEmbedding",
    "collect_activations",
    "count_bytes",
    "set_fake_quantization",
]
