"""Linear layers with 4-bit weights, two to a byte, and a float scale for each group of weights in a row.

Symmetric: integers −7…7 and step = absmax / 7, stored as integer + 8. Asymmetric: integers 0…15 between the group's
minimum and maximum (both widened to hold 0), step = range / 15 and an integer zero point. Even columns lie in the low
half of each byte, odd columns in the high half. A row whose width is no multiple of the group is padded with zero
weights, which are cut off again. Activations and bias stay float; the forward pass computes with exactly the
dequantised weights.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


def pack_four_bit(integers: Tensor) -> Tensor:
    """Integers 0…15, (M, K) with K even -> bytes (M, K / 2)."""
    if integers.shape[-1] % 2:
        raise ValueError(f"an even number of columns is needed to pack two a byte, got {integers.shape[-1]}")
    integers = integers.to(torch.uint8)
    return integers[..., ::2] | (integers[..., 1::2] << 4)


def unpack_four_bit(packed: Tensor) -> Tensor:
    """Bytes (M, K / 2) -> integers 0…15, (M, K) uint8."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)


class FourBitLinear(nn.Module):
    """y = x · W^T + b with W (M, K) held as 4-bit integers, G = ceil(K / group_size) groups a row."""

    weight: Tensor  # (M, G × group_size / 2) uint8
    weight_scale: Tensor  # (M, G) float32
    weight_zero: Tensor | None  # (M, G) uint8, asymmetric only
    bias: Tensor | None

    def __init__(
        self,
        weight: Tensor,
        weight_scale: Tensor,
        weight_zero: Tensor | None,
        bias: Tensor | None,
        *,
        in_features: int,
        group_size: int,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = weight.shape[0]
        self.group_size = group_size
        self.register_buffer("weight", weight)
        self.register_buffer("weight_scale", weight_scale)
        self.register_buffer("weight_zero", weight_zero)
        self.register_buffer("bias", bias)

    @classmethod
    def from_linear(cls, linear: nn.Linear, group_size: int = 64, symmetric: bool = True) -> FourBitLinear:
        """Round the layer's weights to the nearest 4-bit values of their groups."""
        if group_size < 2 or group_size % 2:
            raise ValueError(f"group_size must be even and at least 2, got {group_size}")
        weight = linear.weight.detach().float()
        num_rows, width = weight.shape
        groups = functional.pad(weight, (0, -width % group_size)).view(num_rows, -1, group_size)  # (M, G, group)
        if symmetric:
            step = groups.abs().amax(-1, keepdim=True) / 7
            step = torch.where(step == 0, torch.ones_like(step), step)
            zero = torch.full_like(step, 8)
        else:
            low, high = groups.amin(-1, keepdim=True).clamp_(max=0), groups.amax(-1, keepdim=True).clamp_(min=0)
            step = (high - low) / 15
            step = torch.where(step == 0, torch.ones_like(step), step)
            zero = (-low / step).round_()
        integers = (groups / step).round_().add_(zero).clamp_(0, 15)
        return cls(
            pack_four_bit(integers.view(num_rows, -1)),
            step.squeeze(-1),
            None if symmetric else zero.squeeze(-1).to(torch.uint8),
            None if linear.bias is None else linear.bias.detach().float().clone(),
            in_features=width,
            group_size=group_size,
        )

    def dequantized_weight(self) -> Tensor:
        """(M, K) float32."""
        integers = unpack_four_bit(self.weight).view(self.out_features, -1, self.group_size).float()
        zero = 8.0 if self.weight_zero is None else self.weight_zero[..., None].float()
        weight = (integers - zero) * self.weight_scale[..., None]
        return weight.view(self.out_features, -1)[:, : self.in_features]

    def forward(self, input: Tensor) -> Tensor:
        return functional.linear(input, self.dequantized_weight(), self.bias)

    def extra_repr(self) -> str:
        kind = "symmetric" if self.weight_zero is None else "asymmetric"
        return f"in_features={self.in_features}, out_features={self.out_features}, group_size={self.group_size}, {kind}"
