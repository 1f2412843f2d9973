"""The 8-bit grid: symmetric, absmax / 127 along the last dimension, round half to even.

This is the grid that CTranslate2 deploys (`quantize_s8_row` and `ModelSpec.quantize`: scale = 127 / absmax, a row of
zeros has scale 1, `nearbyint`/`np.rint`), so weights quantised here and there are the same integers. A row is one
output of a linear layer or one token of an embedding for weights, and one token for activations. A row whose scale
float32 does not hold (absmax below 3.73e-37) is a row of zeros.

The step of a row is the reciprocal of that scale: value = integer × step. NaN and infinities in a row make the
whole row NaN when fake-quantised, so that the loss shows them; quantising to integers refuses nothing, check before.

Activations of a calibrated layer use one grid for all tokens instead, −128…127 with a zero point.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

INT8_MAX = 127.0
_SMALLEST = 3.732195e-37
"""The least absmax whose scale float32 holds; torch takes 127 / absmax as 127 × (1 / absmax)."""


def compute_inverse_step(values: Tensor) -> Tensor:
    """127 / absmax of each row of a float tensor (..., K), as (..., 1); 1 where float32 does not hold that."""
    absmax = torch.maximum(values.amax(-1, keepdim=True), values.amin(-1, keepdim=True).neg_())
    return torch.where(absmax < _SMALLEST, 1.0, INT8_MAX / absmax)


def quantize_int8(values: Tensor) -> tuple[Tensor, Tensor]:
    """Integers (..., K) int8 and steps (..., 1) float32 with values ≈ integers × steps."""
    if values.is_meta:  # shapes alone: for arithmetic without storage torch imports its compiler, 1.5 seconds
        steps = values.new_empty((*values.shape[:-1], 1), dtype=torch.float32)
        return torch.empty_like(values, dtype=torch.int8), steps
    values = values.float()
    inverse_step = compute_inverse_step(values)
    return (values * inverse_step).round_().to(torch.int8), inverse_step.reciprocal()


def dequantize_int8(integers: Tensor, steps: Tensor) -> Tensor:
    """The float32 values of `quantize_int8`."""
    return integers * steps


class _StraightThrough(torch.autograd.Function):
    """Rounds, and passes the gradient straight through (Bengio et al., 2013, arXiv:1308.3432)."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, round_values: Callable[[Tensor], Tensor]) -> Tensor:
        rounded = round_values(values)
        # torch 2.11 traces no gradient to what an operation in place has returned; the copy is compiled away.
        return rounded.clone() if torch.compiler.is_compiling() else rounded

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        return grad_outputs[0], None


def round_straight_through(values: Tensor, round_values: Callable[[Tensor], Tensor]) -> Tensor:
    """`round_values(values)` of float32 (half types are widened) or float64, with the gradient of the identity."""
    if values.dtype in (torch.bfloat16, torch.float16):
        values = values.float()
    apply: Callable[[Tensor, Callable[[Tensor], Tensor]], Tensor] = _StraightThrough.apply
    return apply(values, round_values)


def fake_quantize(values: Tensor) -> Tensor:
    """`dequantize_int8(*quantize_int8(values))` with a straight-through gradient. Float in, float32 or float64 out."""
    return round_straight_through(values, _round_to_grid)


def _round_to_grid(values: Tensor) -> Tensor:
    inverse_step = compute_inverse_step(values)
    return (values * inverse_step).round_().mul_(inverse_step.reciprocal())


def compute_static_grid(low: float, high: float) -> tuple[float, int]:
    """Step and zero point of the grid −128…127 that spans low … high, widened to hold 0: value = (integer − zero) ×
    step."""
    low, high = min(low, 0.0), max(high, 0.0)
    step = (high - low) / 255 if high - low > 1e-30 else 1.0
    return step, round(-128 - low / step)


def quantize_static(values: Tensor, step: Tensor, zero: Tensor) -> Tensor:
    """Integers (..., K) int8 on the grid of `compute_static_grid`; values beyond it are cut off."""
    return values.mul(step.reciprocal()).add_(zero).round_().clamp_(-128, 127).to(torch.int8)


@functools.cache
def has_exact_int_mm(device_type: str) -> bool:
    """Whether torch._int_mm exists for the device and accumulates exactly (some old CPUs saturate at 16 bits)."""
    if device_type != "cpu" or not hasattr(torch, "_int_mm"):
        return False
    left = torch.full((32, 256), 127, dtype=torch.int8)
    right = torch.full((256, 32), -127, dtype=torch.int8)
    right[:, ::2] = 127
    try:
        product = torch._int_mm(left, right)
    except RuntimeError:
        return False
    return torch.equal(product, (left.double() @ right.double()).to(torch.int32))


def multiply_int8(left: Tensor, right: Tensor) -> Tensor:
    """left (N, K) int8 × right (M, K) int8, transposed -> (N, M): int32, or float32 of the same integers.

    Where there is no integer kernel the product is taken in float32, which is exact while sums stay below 2^24;
    longer rows are cut so that each partial sum is exact. So it is for K = 1, where torch._int_mm (2.13) reads past its
    operands.
    """
    if left.shape[1] > 1 and has_exact_int_mm(left.device.type):
        return torch._int_mm(left, right.t())
    longest = 1024  # 1024 × 127 × 127 < 2^24
    parts = [
        left[:, start : start + longest].float() @ right[:, start : start + longest].float().t()
        for start in range(0, left.shape[1], longest)
    ]
    return functools.reduce(torch.add, parts)


def linear_int8(values: Tensor, weight: Tensor, weight_step: Tensor, bias: Tensor | None) -> Tensor:
    """values (..., K) quantised per token × weight (M, K) int8 with steps (M,) -> (..., M) float32."""
    integers, steps = quantize_int8(values.reshape(-1, values.shape[-1]))
    output = multiply_int8(integers, weight).float().mul_(steps).mul_(weight_step)
    if bias is not None:
        output.add_(bias)
    return output.view(*values.shape[:-1], weight.shape[0])
