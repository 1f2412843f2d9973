"""Dropout that is cheap on a CPU.

PyTorch draws one Bernoulli number an element there, which costs as much as a small matrix product. Here one 64-bit draw
decides for four elements, 16 bits each, so the probability is rounded to a multiple of 1/65,536. The draws come from
torch's default CPU generator and do not depend on the number of threads. Other devices use PyTorch's own dropout.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def dropout(values: Tensor, probability: float, training: bool) -> Tensor:
    """Zero each element with the given probability and scale the others by 1 / (1 − probability), when training."""
    if not training or probability == 0.0:
        return values
    if values.device.type != "cpu":
        return functional.dropout(values, probability, True)
    threshold = round(probability * 65536) - 32768
    bits = torch.empty((values.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
    keep = bits.view(torch.int16)[: values.numel()].view(values.shape) >= threshold
    return values * keep.to(values.dtype).mul_(1.0 / (1.0 - probability))
