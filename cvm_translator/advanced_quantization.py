"""Public names for quantising a model."""

from __future__ import annotations

from cvm_translator.quantization import AdvancedQuantizer, FourBitLinear, MemoryOptimizedQuantizer, QuantizationType

__all__ = ["AdvancedQuantizer", "FourBitLinear", "MemoryOptimizedQuantizer", "QuantizationType"]
