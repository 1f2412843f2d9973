"""PyTorch's fast product of float activations and 4-bit weights, where it has one that gives the right numbers.

The operators are private to PyTorch (`_weight_int4pack_mm_for_cpu`, `_weight_int4pack_mm` on CUDA), so each is put to
the test on a small product, once a process and device type; where it is missing, fails or differs, there is no kernel.

They take bfloat16 activations and give bfloat16 outputs; weights and sums are float32 within. (With float32 activations
the CPU's operator is a plain loop, 20 times slower for one row: not used.) They are made for few rows. Up to
`FAST_ROWS` they are faster than dequantising the weights for a bfloat16 product, above they are slower; µs for 256
inputs and 1,024 outputs on one Zen 5 core, torch 2.13:

    rows                                     1     8    32    64   128   256
    the operator                            30    68   220   426   831  1683
    dequantised, bfloat16                    –     –   342   432   578   912
    dequantised, float32                   202   250   371   545   851  1505
    float32 weights, kept                   29    76   195   354   674  1338

Steps of `four_bit_grid` are bfloat16 numbers, so the error of the operator is that of rounding inputs and outputs to 8
significant bits, each by 2⁻⁸ of itself at most, and on asymmetric grids offsets O = (8 − zero) × step; above
`FAST_ROWS` weights are rounded instead of offsets:

    |y_fast − y| ≤ 2⁻⁸ · (|x| · (|W| + |O|)ᵀ + |y|)       elementwise; in practice 0.3 % of the largest
    |y_fast − y| ≤ 2⁻⁸ · (|x| · 2 |W|ᵀ + |y|)             above `FAST_ROWS`

Where the processor has no bfloat16 instructions, many rows are multiplied in float32.

The operators know groups of 32, 64, 128 and 256 and multiples of 16 outputs. Larger groups are cut into such (with the
same step), outputs and inputs padded; other group sizes have no kernel. A kernel keeps its own copy of the packed
weights: half a byte a weight.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from cvm_translator.quantization.four_bit_grid import SYMMETRIC_ZERO, FourBit, dequantize_four_bit, find_group

FAST_ROWS = 64
"""Up to so many rows the operator is faster than dequantising."""
_GROUP_SIZES = (256, 128, 64, 32)
_OUTPUT_MULTIPLE = 16


@dataclass(frozen=True)
class FourBitKernel:
    """A matrix (M, K) in the operator's own layout."""

    packed: Tensor
    steps_and_offsets: Tensor
    """(groups a row, M padded, 2) bfloat16: value = (code − 8) × step + offset."""
    group_size: int
    width: int
    """K padded to whole groups of the operator."""
    out_features: int

    def multiply(self, values: Tensor) -> Tensor:
        """values (..., K) -> (..., M), in the type of the values."""
        rows = values.reshape(-1, values.shape[-1])
        rows = pad(rows, (0, self.width - rows.shape[1])).to(torch.bfloat16)
        operator = (
            torch.ops.aten._weight_int4pack_mm_for_cpu
            if rows.device.type == "cpu"
            else torch.ops.aten._weight_int4pack_mm
        )
        product = operator(rows, self.packed, self.group_size, self.steps_and_offsets)
        output: Tensor = product[:, : self.out_features].to(values.dtype).view(*values.shape[:-1], self.out_features)
        return output


def build_four_bit_kernel(quantized: FourBit, group_size: int | None) -> FourBitKernel | None:
    """The matrix in the operator's layout, or None where the device or the group size has no fast kernel."""
    if find_kernel_group(quantized.codes.shape[1], group_size) is None:
        return None
    return _build(quantized, group_size) if has_four_bit_kernel(quantized.codes.device.type) else None


def find_kernel_group(width: int, group_size: int | None) -> int | None:
    """The operator's group size for rows of `width`, or None where there is none."""
    group = find_group(width, group_size)
    if group == width:
        group += -width % _GROUP_SIZES[-1]
    return next((size for size in _GROUP_SIZES if group % size == 0), None)


@torch.no_grad()
def _build(quantized: FourBit, group_size: int | None) -> FourBitKernel:
    codes, steps, zeros = quantized
    num_rows, width = codes.shape
    kernel_group = find_kernel_group(width, group_size)
    assert kernel_group is not None
    padded_width = width + -width % kernel_group
    more_rows = -num_rows % _OUTPUT_MULTIPLE
    codes = pad(codes, (0, padded_width - width, 0, more_rows), value=SYMMETRIC_ZERO)
    scales = steps.float()  # (M, G)
    offsets = torch.zeros_like(scales) if zeros is None else (SYMMETRIC_ZERO - zeros.float()) * scales
    repeats = -(-find_group(width, group_size) // kernel_group)
    both = torch.stack((scales, offsets), dim=-1).repeat_interleave(repeats, dim=1)[:, : padded_width // kernel_group]
    both = pad(both, (0, 0, 0, 0, 0, more_rows)).transpose(0, 1).contiguous().to(torch.bfloat16)
    return FourBitKernel(_pack(codes), both, kernel_group, padded_width, num_rows)


def _pack(codes: Tensor) -> Tensor:
    """Codes (M, K) in the layout of the device's operator."""
    if codes.device.type == "cpu":
        packed: Tensor = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
        return packed
    inner_tiles = next(tiles for tiles in (8, 4, 2) if codes.shape[1] % (16 * tiles) == 0)
    packed = torch.ops.aten._convert_weight_to_int4pack(codes[:, ::2] << 4 | codes[:, 1::2], inner_tiles)
    return packed


def multiply_dequantized(values: Tensor, weight: Tensor) -> Tensor:
    """values (..., K) × weight (M, K), transposed -> (..., M); in bfloat16 where that is faster."""
    if not has_bfloat16_instructions(values.device.type):
        return linear(values, weight)
    return linear(values.to(torch.bfloat16), weight.to(torch.bfloat16)).to(values.dtype)


@functools.cache
def has_bfloat16_instructions(device_type: str) -> bool:
    """Whether bfloat16 products are faster than float32 ones."""
    if device_type != "cpu":
        return device_type == "cuda"
    return bool(getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)())


@functools.cache
def has_four_bit_kernel(device_type: str) -> bool:
    """Whether the operator exists for the device type and computes a small product rightly."""
    if device_type not in ("cpu", "cuda"):
        return False
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (24, 160), generator=generator, dtype=torch.uint8)
    quantized = FourBit(
        codes, torch.full((24, 3), 0.25, dtype=torch.float16), torch.full((24, 3), 5, dtype=torch.uint8)
    )
    quantized = FourBit(*(tensor.to(device_type) for tensor in quantized if tensor is not None))
    values = torch.randn(3, 160, generator=generator).to(device_type).bfloat16().float()
    expected = values @ dequantize_four_bit(quantized, 64).T
    try:
        actual = _build(quantized, 64).multiply(values)
    except (RuntimeError, AttributeError, NotImplementedError):
        return False
    return bool(((actual - expected).abs() <= 2**-7 * expected.abs().amax()).all())
