"""The linear layer and the tied embedding that models are built from and trained with, in float.

With `fake_quantization` on, they compute in float what their deployed form computes in `fake_format` — weights, and in
`int8` the inputs too, rounded to its grid — with straight-through gradients; the two agree up to the rounding of
float32. Biases stay float.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from cvm_translator.quantization.formats import INT8, LayerFormat
from cvm_translator.quantization.four_bit_grid import fake_quantize_four_bit
from cvm_translator.quantization.grid import fake_quantize, round_straight_through


def _round_half(weight: Tensor) -> Tensor:
    return round_straight_through(weight, lambda values: values.to(torch.float16).to(values.dtype))


FAKE_WEIGHTS: dict[str, Callable[[Tensor, LayerFormat], Tensor]] = {
    "float32": lambda weight, _: weight,
    "float16": lambda weight, _: _round_half(weight),
    "int8": lambda weight, _: fake_quantize(weight),
    "int8_weights": lambda weight, _: fake_quantize(weight),
    "int4": lambda weight, f: fake_quantize_four_bit(weight, f.group_size, f.symmetric),
}
"""Formats that training can see. Not `int8_static`: its activation grid is found after training."""


def _narrow_to(weight: Tensor, input: Tensor) -> Tensor:
    """The input in a bfloat16 weight's type: such models add up and normalise in float32."""
    return input.to(weight.dtype) if weight.dtype == torch.bfloat16 else input


class QuantizableLinear(nn.Linear):
    """nn.Linear that can round its weights and its inputs as its deployed form will."""

    fake_quantization: bool = False
    fake_format: LayerFormat = INT8

    def forward(self, input: Tensor) -> Tensor:
        if not self.fake_quantization:
            return functional.linear(_narrow_to(self.weight, input), self.weight, self.bias)
        weight = FAKE_WEIGHTS[self.fake_format.kind](self.weight, self.fake_format)
        return functional.linear(fake_quantize(input) if self.fake_format.kind == "int8" else input, weight, self.bias)


class Embedding(Protocol):
    """What a token embedding offers, in whatever format it is kept."""

    def matrix(self) -> Tensor: ...

    def embed(self, ids: Tensor, matrix: Tensor | None = None) -> Tensor: ...


class _Lookups(torch.autograd.Function):
    """(matrix, ids, …) -> the matrix, and its rows at each ids.

    The rows' gradients are added into the matrix's own, which the loss has just made and nobody else holds. PyTorch's
    embedding would make a dense one of each and add them up: at 32,000 × 512 a twentieth of a training step.
    """

    @staticmethod
    def forward(ctx: Any, matrix: Tensor, *ids: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(*ids)
        return matrix.view_as(matrix), *(functional.embedding(each, matrix) for each in ids)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        total = grads[0].contiguous()
        for ids, rows in zip(ctx.saved_tensors, grads[1:], strict=True):
            total.index_add_(0, ids.flatten(), rows.flatten(0, -2))  # in any order on a GPU, unless told otherwise
        return total, *(None for _ in ctx.saved_tensors)


def look_up(embedding: Embedding, *ids: Tensor) -> tuple[Tensor, ...]:
    """The matrix (V, D), and what is embedded at each of the ids, (...) -> (..., D); see `_Lookups`."""
    matrix = embedding.matrix()
    if not (torch.is_grad_enabled() and matrix.requires_grad):
        return matrix, *(embedding.embed(each, matrix) for each in ids)
    found: tuple[Tensor, ...] = _Lookups.apply(matrix, *ids)  # type: ignore[no-untyped-call]
    return found


class TiedEmbedding(nn.Module):
    """One matrix (V, D) that embeds tokens and projects hidden states to logits.

    A training step takes the matrix once, with what is embedded, and hands it to the loss, so that a fake-quantised
    matrix is made once per step and its gradient is that of all its uses.
    """

    fake_quantization: bool = False
    fake_format: LayerFormat = INT8
    watch_hidden: Callable[[Tensor], object] | None = None
    """Called with the hidden states that are to be projected: calibration looks at them."""

    def __init__(self, vocab_size: int, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, dim))
        if not self.weight.is_meta:  # nothing is drawn there, but torch imports its compiler for it
            nn.init.normal_(self.weight, std=dim**-0.5)

    def matrix(self) -> Tensor:
        """(V, D), rounded to the grid when fake quantisation is on."""
        if not self.fake_quantization:
            return self.weight
        return FAKE_WEIGHTS[self.fake_format.kind](self.weight, self.fake_format)

    def decoding_matrix(self) -> Tensor | None:
        """What `embed` and `project` are best given in every step of a search."""
        return self.matrix()

    def embed(self, ids: Tensor, matrix: Tensor | None = None) -> Tensor:
        """Rows of the matrix: ids (...) -> (..., D). `matrix` saves making it again."""
        return functional.embedding(ids, self.matrix() if matrix is None else matrix)

    def round_hidden(self, hidden: Tensor) -> Tensor:
        """Hidden states as `project` sees them: (..., D), rounded per token when fake quantisation is on."""
        if self.watch_hidden is not None:
            self.watch_hidden(hidden)
        return fake_quantize(hidden) if self.fake_quantization and self.fake_format.kind == "int8" else hidden

    def project(self, hidden: Tensor, matrix: Tensor | None = None) -> Tensor:
        """Logits: hidden (..., D) -> (..., V)."""
        matrix = self.matrix() if matrix is None else matrix
        return functional.linear(_narrow_to(matrix, self.round_hidden(hidden)), matrix)
