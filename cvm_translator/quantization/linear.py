"""Linear layers and the tied embedding, in float (with or without fake quantisation) and in 8-bit integers.

`QuantizableLinear` and `TiedEmbedding` are what models are built from. With `fake_quantization` on, they compute in
float what `Int8Linear` and `Int8TiedEmbedding` compute in integers, with straight-through gradients; the two agree up
to the rounding of float32. Biases stay float.

In a state_dict the integer modules hold `weight` (int8) and `weight_scale` (float32, one step a row).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from cvm_translator.quantization.grid import dequantize_int8, fake_quantize, linear_int8, quantize_int8


class QuantizableLinear(nn.Linear):
    """nn.Linear that can round its weight rows and its input tokens to the 8-bit grid."""

    fake_quantization: bool = False

    def forward(self, input: Tensor) -> Tensor:
        if self.fake_quantization:
            return functional.linear(fake_quantize(input), fake_quantize(self.weight), self.bias)
        return functional.linear(input, self.weight, self.bias)


class Int8Linear(nn.Module):
    """A linear layer with int8 weights (M, K), one step a row, and inputs quantised per token as they come."""

    weight: Tensor
    weight_scale: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("weight_scale", weight_scale)
        self.register_buffer("bias", bias)

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> Int8Linear:
        weight, steps = quantize_int8(linear.weight.detach())
        bias = None if linear.bias is None else linear.bias.detach().float().clone()
        return cls(weight, steps.flatten(), bias)

    @property
    def in_features(self) -> int:
        return self.weight.shape[1]

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]

    def forward(self, input: Tensor) -> Tensor:
        return linear_int8(input, self.weight, self.weight_scale, self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class TiedEmbedding(nn.Module):
    """One matrix (V, D) that embeds tokens and projects hidden states to logits.

    A training step takes `matrix()` once and hands it to `embed` and to the loss, so that a fake-quantised matrix is
    made once per step and its gradient is that of all its uses.
    """

    fake_quantization: bool = False

    def __init__(self, vocab_size: int, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, dim))
        nn.init.normal_(self.weight, std=dim**-0.5)

    def matrix(self) -> Tensor:
        """(V, D), rounded to the grid when fake quantisation is on."""
        return fake_quantize(self.weight) if self.fake_quantization else self.weight

    def embed(self, ids: Tensor, matrix: Tensor | None = None) -> Tensor:
        """Rows of the matrix: ids (...) -> (..., D). `matrix` saves making it again."""
        return functional.embedding(ids, self.matrix() if matrix is None else matrix)

    def round_hidden(self, hidden: Tensor) -> Tensor:
        """Hidden states as `project` sees them: (..., D), rounded per token when fake quantisation is on."""
        return fake_quantize(hidden) if self.fake_quantization else hidden

    def project(self, hidden: Tensor, matrix: Tensor | None = None) -> Tensor:
        """Logits: hidden (..., D) -> (..., V)."""
        return functional.linear(self.round_hidden(hidden), self.matrix() if matrix is None else matrix)


class Int8TiedEmbedding(nn.Module):
    """`TiedEmbedding` with int8 rows."""

    weight: Tensor
    weight_scale: Tensor

    def __init__(self, weight: Tensor, weight_scale: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("weight_scale", weight_scale)

    @classmethod
    def from_embedding(cls, embedding: TiedEmbedding) -> Int8TiedEmbedding:
        weight, steps = quantize_int8(embedding.weight.detach())
        return cls(weight, steps.flatten())

    def matrix(self) -> Tensor:
        """(V, D) float32: the values of the integers."""
        return dequantize_int8(self.weight, self.weight_scale[:, None])

    def embed(self, ids: Tensor, matrix: Tensor | None = None) -> Tensor:
        if matrix is not None:
            return functional.embedding(ids, matrix)
        return dequantize_int8(self.weight[ids], self.weight_scale[ids][..., None])

    def round_hidden(self, hidden: Tensor) -> Tensor:
        return fake_quantize(hidden)

    def project(self, hidden: Tensor, matrix: Tensor | None = None) -> Tensor:
        if matrix is not None:
            return functional.linear(fake_quantize(hidden), matrix)
        return linear_int8(hidden, self.weight, self.weight_scale, None)
