"""The likeliest token of hidden states, exactly, from logits that are not exact but bounded.

A product of one row reads every weight once and is as slow as memory is; with a large vocabulary the output matrix is
nearly half of what a decoding step reads. For few rows the product is therefore made with a 4-bit copy of the matrix,
an eighth of the float32 bytes (`OutputScreen`). The product of a bfloat16 model rounds its logits to 8 significant
bits, and among 32,000 tokens the best two are often closer than that (`choose_among_rounded`). In both cases how far
each logit can be from the true one is bounded, so that few tokens are left that could be the best. Their logits are
then computed in float32 from the weights themselves.

With ŵ the row that was multiplied (4 bits, or w itself), x̂ the hidden state in the bfloat16 of the product, and z its
output (also bfloat16), by Cauchy and Schwarz, for D summands:

    |x·w − z| ≤ ‖x‖·‖w − ŵ‖ + ‖x − x̂‖·‖ŵ‖ + D·2⁻²³·‖x̂‖·‖ŵ‖ + 2⁻⁸·1.01·|z|

Of 32,000 tokens of a trained model of 512 dimensions the 4-bit copy leaves a few dozen as a rule, bfloat16 one or two.
What is chosen is what the product in float32 with the model's own weights chooses, up to the rounding of its sums.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from cvm_translator.quantization.four_bit_grid import FourBit, dequantize_four_bit, quantize_four_bit
from cvm_translator.quantization.kernels import FourBitKernel, build_four_bit_kernel, has_four_bit_kernel

MAX_ROWS = 4
"""Hidden states at once: more make a product that does not wait for memory."""
MIN_ELEMENTS = 1 << 22
"""Of the matrix: below, the bounds cost what the product saves."""
GROUP_SIZE = 32
MAX_CANDIDATES = 2048
_OUTPUT_ROUNDING = 1.01 * 2.0**-8
_ROWS_A_TIME = 8192


def can_screen(weight: Tensor) -> bool:
    """Whether there is a kernel for a matrix (V, D), and enough of a matrix."""
    if weight.device.type != "cpu" or weight.dtype not in (torch.float32, torch.bfloat16):
        return False
    return weight.numel() >= MIN_ELEMENTS and weight.shape[1] % GROUP_SIZE == 0 and has_four_bit_kernel("cpu")


class OutputScreen:
    """See the module's docstring. The weight (V, D) is kept as it is, its 4-bit copy takes 5/8 of a byte a weight."""

    def __init__(self, weight: Tensor) -> None:
        self._weight = weight
        parts, errors, norms = [], [], []
        for rows in torch.split(weight.detach(), _ROWS_A_TIME):
            quantized = quantize_four_bit(rows, GROUP_SIZE, symmetric=True)
            rounded = dequantize_four_bit(quantized, GROUP_SIZE)
            parts.append(quantized)
            norms.append(rounded.norm(dim=1))
            errors.append((rows.float() - rounded).norm(dim=1) + weight.shape[1] * 2.0**-23 * norms[-1])
        whole = FourBit(torch.cat([part.codes for part in parts]), torch.cat([part.steps for part in parts]), None)
        kernel = build_four_bit_kernel(whole, GROUP_SIZE)
        assert kernel is not None, "can_screen says whether there is one"
        self._kernel: FourBitKernel = kernel
        self._bounds = torch.stack((torch.cat(errors), torch.cat(norms)))  # (2, V)

    def bound_logits(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """hidden (R, D) float32 or bfloat16 -> what its logits are at least and at most, (R, V) float32 each."""
        x = hidden.float()
        rounding = x - x.to(torch.bfloat16)
        logits = self._kernel.multiply(hidden).float()
        margins = torch.stack((x.norm(dim=1), rounding.norm(dim=1)), dim=1) @ self._bounds
        margins.add_(logits.abs(), alpha=_OUTPUT_ROUNDING)
        return logits - margins, logits.add_(margins)

    def find_candidates(self, hidden: Tensor, forbidden: list[int]) -> Tensor:
        """hidden (R, D) -> (R, V) bool, True at the best token that is not forbidden and at all that might be it."""
        lowest, highest = self.bound_logits(hidden)
        lowest[:, forbidden] = highest[:, forbidden] = -math.inf
        return highest >= lowest.amax(1, keepdim=True)

    def choose(self, hidden: Tensor, forbidden: list[int]) -> list[int | None]:
        """The best token of each hidden state (R, D) that is not forbidden; None where too many might be it."""
        chosen: list[int | None] = []
        for x, candidates in zip(hidden, self.find_candidates(hidden, forbidden), strict=True):
            tokens = candidates.nonzero()[:, 0]
            if not 0 < len(tokens) <= MAX_CANDIDATES:  # none where the hidden state is not finite
                chosen.append(None)
            else:
                chosen.append(_choose_exactly(x, self._weight, tokens))
        return chosen


def find_largest(logits: Tensor) -> Tensor:
    """Of each row (R, V) on a CPU the place of the largest, (R,): in a tenth of the time that PyTorch takes for it."""
    return torch.from_numpy(logits.float().numpy().argmax(-1))


def choose_among_rounded(logits: Tensor, hidden: Tensor, weight: Tensor, longest: float) -> Tensor:
    """The best tokens (R,) by their bfloat16 logits (R, V) and, where those leave several, by exact ones.

    hidden (R, D) float32 or bfloat16, weight (V, D), `longest` at least the norm of any of its rows. Tokens whose
    logits are −∞ are not chosen, unless all are.
    """
    wide = logits.float()
    chosen = find_largest(wide)
    best = wide.gather(1, chosen[:, None])
    x = hidden.float()
    of_sums = weight.shape[1] * 2.0**-23 * x.norm(dim=1, keepdim=True)
    of_states = (x - x.to(torch.bfloat16)).norm(dim=1, keepdim=True)
    # Both logits err, hence 2; 0.1 is for those below 0, whose own rounding is larger than the best one's.
    margins = 2.1 * (_OUTPUT_ROUNDING * best.abs() + longest * (of_states + of_sums))
    rows, tokens = np.nonzero(((wide >= best - margins) & (wide > -math.inf)).numpy())
    ends = np.searchsorted(rows, np.arange(len(chosen) + 1))
    for row in np.flatnonzero(np.diff(ends) > 1):
        candidates = torch.from_numpy(tokens[ends[row] : ends[row + 1]])
        chosen[row] = _choose_exactly(x[row], weight, candidates)
    return chosen


def _choose_exactly(hidden: Tensor, weight: Tensor, tokens: Tensor) -> int:
    """Of some tokens (n,) of a matrix (V, D) the best one after one hidden state (D,)."""
    if len(tokens) == 1:
        return int(tokens)
    return int(tokens[(weight[tokens].float() @ hidden.float()).argmax()])
