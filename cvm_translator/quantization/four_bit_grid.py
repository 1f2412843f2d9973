"""The 4-bit grid: groups of weights along a row, each with a step (and a zero point); packing; fake quantisation.

Symmetric: integers −7…7, step = absmax / 7, held as integer + 8. Asymmetric: integers 0…15 between the group's minimum
and maximum (both widened to hold 0), step = range / 15 and an integer zero point. Zero is always on the grid.

A step is rounded *up* to 8 significant bits that float16 holds. So what is stored (float16) is what was computed with;
no weight is cut off, and a weight is at most half a stored step from its value on the grid; and the bfloat16 that the
fast kernels want is the same number. The steps are 0.3 % wider for it on average. Weights of more than 457,000 times 1
need a step that float16 does not hold: they are refused.

A row's last group is shorter where the group size does not divide the width. Two integers make a byte: even columns in
the low half, odd columns in the high half, a row of odd width filled up with the code of zero.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from cvm_translator.quantization.grid import round_straight_through

SYMMETRIC_ZERO = 8
"""The code of zero on the symmetric grid."""
_SMALLEST_NORMAL, _SUBNORMAL = 2.0**-14, 2.0**-24
_LARGEST_STEP = 65280.0  # the largest number with 8 significant bits that float16 holds


class FourBit(NamedTuple):
    """A matrix on the grid: codes (M, K) uint8, 0…15; steps (M, G) float16; zero points (M, G) uint8 or None."""

    codes: Tensor
    steps: Tensor
    zeros: Tensor | None


def find_group(width: int, group_size: int | None) -> int:
    """Weights a group in a row of `width`: a whole row for None and where the row is shorter."""
    return width if group_size is None else min(group_size, width)


def round_step(steps: Tensor) -> Tensor:
    """Positive float32 numbers, each rounded up to the next that has 8 significant bits and that float16 holds."""
    rounded = ((steps.view(torch.int32) + 0xFFFF) & ~0xFFFF).view(torch.float32)
    return torch.where(rounded < _SMALLEST_NORMAL, (rounded / _SUBNORMAL).ceil_() * _SUBNORMAL, rounded)


def quantize_four_bit(weight: Tensor, group_size: int | None, symmetric: bool) -> FourBit:
    """Round a float matrix (M, K) to the nearest values of its groups' grids."""
    if weight.is_meta:  # shapes alone, see `quantize_int8`
        num_rows, width = weight.shape
        steps = weight.new_empty((num_rows, -(-width // find_group(width, group_size))), dtype=torch.float16)
        zeros = None if symmetric else torch.empty_like(steps, dtype=torch.uint8)
        return FourBit(torch.empty_like(weight, dtype=torch.uint8), steps, zeros)
    codes, steps, zeros = _round_groups(_cut(weight.float(), group_size), symmetric)
    if bool((steps > _LARGEST_STEP).any()):
        raise ValueError("a weight is too large for a 4-bit grid with float16 steps (457,000): use int8 or float32")
    codes = codes.add_(SYMMETRIC_ZERO if zeros is None else zeros).to(torch.uint8).flatten(1)[:, : weight.shape[1]]
    return FourBit(codes, steps[..., 0].half(), None if zeros is None else zeros[..., 0].to(torch.uint8))


def dequantize_four_bit(quantized: FourBit, group_size: int | None) -> Tensor:
    """(M, K) float32: (code − zero) × step, exact but for the rounding of one float32 product."""
    codes, steps, zeros = quantized
    groups = _cut(codes, group_size).to(torch.float32)  # (M, G, group)
    groups.sub_(SYMMETRIC_ZERO if zeros is None else zeros[..., None]).mul_(steps[..., None].float())
    return groups.flatten(1)[:, : codes.shape[1]]


def _cut(matrix: Tensor, group_size: int | None) -> Tensor:
    """(M, K) -> (M, G, group), the last group filled up with zeros."""
    num_rows, width = matrix.shape
    group = find_group(width, group_size)
    return functional.pad(matrix, (0, -width % group)).view(num_rows, -1, group)


def _round_groups(groups: Tensor, symmetric: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Float integers around zero (M, G, group), steps (M, G, 1), zero points (M, G, 1) or None; NaN stays NaN."""
    if symmetric:
        steps = groups.abs().amax(-1, keepdim=True) / 7
    else:
        low, high = groups.amin(-1, keepdim=True).clamp_(max=0), groups.amax(-1, keepdim=True).clamp_(min=0)
        steps = (high - low) / 15
    steps = torch.where(steps == 0, torch.ones_like(steps), round_step(steps))
    integers = (groups / steps).round_()
    if symmetric:
        return integers, steps, None
    zeros = (-low / steps).round_()
    return integers.clamp_(-zeros, 15 - zeros), steps, zeros


def fake_quantize_four_bit(weight: Tensor, group_size: int | None, symmetric: bool) -> Tensor:
    """`dequantize_four_bit(quantize_four_bit(…))` of (M, K) with a straight-through gradient."""

    def round_to_grid(weight: Tensor) -> Tensor:
        integers, steps, _ = _round_groups(_cut(weight.float(), group_size), symmetric)
        return integers.mul_(steps).flatten(1)[:, : weight.shape[1]].contiguous()

    return round_straight_through(weight, round_to_grid)


def pack_four_bit(codes: Tensor) -> Tensor:
    """Codes 0…15, (..., K) -> bytes (..., ⌈K / 2⌉)."""
    if codes.is_meta:
        return codes.new_empty((*codes.shape[:-1], -(-codes.shape[-1] // 2)), dtype=torch.uint8)
    codes = functional.pad(codes.to(torch.uint8), (0, codes.shape[-1] % 2), value=SYMMETRIC_ZERO)
    return codes[..., ::2] | (codes[..., 1::2] << 4)


def unpack_four_bit(packed: Tensor, width: int) -> Tensor:
    """Bytes (..., ⌈K / 2⌉) -> codes 0…15, (..., K = width) uint8."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)[..., :width]
