"""Linear layers and the tied embedding with 4-bit weights, two to a byte, and a float16 step for each group of them.

`FourBitLinear` stores `weight` (M, ⌈K / 2⌉) uint8, `weight_scale` (M, G) float16 and, on asymmetric grids,
`weight_zero` (M, G) uint8; see `four_bit_grid` for what they mean and `kernels` for the fast product. Activations and
bias stay float.

Up to `FAST_ROWS` rows are multiplied by the kernel, more rows by weights that are dequantised for the call, both in
bfloat16. Group sizes without a kernel (those that 32 does not divide) multiply exactly, in float32, and keep the
dequantised weights from the first use on, 4 bytes a weight. So does the tied embedding always: its logits decide
between words, and a kernel's bfloat16 outputs have ties where they have none.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from cvm_translator.quantization.deployed import DeployedLinear, DeployedTiedEmbedding, check_weight
from cvm_translator.quantization.formats import LayerFormat
from cvm_translator.quantization.four_bit_grid import (
    FourBit,
    dequantize_four_bit,
    pack_four_bit,
    quantize_four_bit,
    unpack_four_bit,
)
from cvm_translator.quantization.kernels import FAST_ROWS, FourBitKernel, build_four_bit_kernel, multiply_dequantized


class FourBitLinear(DeployedLinear):
    """y = x · Wᵀ + b with W (M, K) held as 4-bit integers, G groups a row; see the module's docstring."""

    weight_scale: Tensor
    weight_zero: Tensor | None

    def __init__(self, quantized: FourBit, bias: Tensor | None, layer_format: LayerFormat) -> None:
        super().__init__(layer_format, quantized.codes.shape, bias)
        self.register_buffer("weight", pack_four_bit(quantized.codes))
        self.register_buffer("weight_scale", quantized.steps)
        self.register_buffer("weight_zero", quantized.zeros)

    @classmethod
    def from_weight(cls, weight: Tensor, bias: Tensor | None, layer_format: LayerFormat) -> FourBitLinear:
        quantized = quantize_four_bit(check_weight(weight), layer_format.group_size, layer_format.symmetric)
        return cls(quantized, bias, layer_format)

    @classmethod
    def from_linear(cls, linear: nn.Linear, group_size: int | None = 64, symmetric: bool = True) -> FourBitLinear:
        """Round a layer's weights to the nearest 4-bit values of their groups; None: a group is a whole row."""
        return cls.from_weight(linear.weight, linear.bias, LayerFormat("int4", group_size, symmetric))

    def quantized(self) -> FourBit:
        """The stored matrix, one code a byte."""
        return FourBit(unpack_four_bit(self.weight, self.in_features), self.weight_scale, self.weight_zero)

    def dequantized_weight(self) -> Tensor:
        return dequantize_four_bit(self.quantized(), self.layer_format.group_size)

    def forward(self, input: Tensor) -> Tensor:
        if self._prepared is None:
            with torch.inference_mode(False), torch.no_grad():
                kernel = build_four_bit_kernel(self.quantized(), self.layer_format.group_size)
                self._prepared = self.dequantized_weight() if kernel is None else kernel
        if not isinstance(self._prepared, FourBitKernel):
            return functional.linear(input, self._prepared, self.bias)
        if input.numel() > FAST_ROWS * self.in_features:
            output = multiply_dequantized(input, self.dequantized_weight())
        else:
            output = self._prepared.multiply(input)
        return output if self.bias is None else output + self.bias


class FourBitTiedEmbedding(DeployedTiedEmbedding, FourBitLinear):
    """`TiedEmbedding` with 4-bit rows."""

    forward = DeployedLinear.forward
