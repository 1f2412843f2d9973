"""Float layers whose weights are laid out as oneDNN's matrix products like them best, for decoding on a CPU.

PyTorch hands a layer's weights to oneDNN or MKL as they are, and few rows, as decoding has, do not pay for putting them
in order. In order once, most products of 1 to 128 rows take 0.5 to 0.95 of the time (torch 2.13, one Zen 4 core: 32
rows of 512 × 32,000 in float32 11.4 instead of 21.5 ms, a row of them in bfloat16 2.4 instead of 4.0 ms).

Guarantees: the same products up to the rounding of sums; the layers that are put aside come back unchanged, whatever
happens meanwhile. Layers that are rounded as they compute, that another device or type holds, or that would not gain
stay what they are, as do all where PyTorch has no such products.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional

from cvm_translator.models.screening import MAX_ROWS, OutputScreen, can_screen, choose_among_rounded, find_largest
from cvm_translator.quantization import QuantizableLinear, TiedEmbedding
from cvm_translator.quantization.convert import replace_layers

_LEAST_ELEMENTS = {torch.float32: 1 << 18, torch.bfloat16: 0}
"""Of a weight: below, float32 products of one row get slower (192 × 192: 17 instead of 6 µs)."""

_SCREEN_AFTER = 100
"""Products of few rows, which take about as long as making a screen does."""


class PackedLinear(nn.Module):
    """y = x · Wᵀ + b, not trainable."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self._dtype = weight.dtype
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach())
        self._bias = None if bias is None else bias.detach()

    def forward(self, input: Tensor) -> Tensor:
        input = input.to(self._dtype)
        y: Tensor = torch.ops.mkldnn._linear_pointwise(input, self._weight, self._bias, "none", [], "")
        return y


class PackedEmbedding(nn.Module):
    """A tied embedding that projects with packed weights, and embeds with the plain ones."""

    def __init__(self, embedding: TiedEmbedding) -> None:
        super().__init__()
        self._plain = embedding.weight.detach()
        self._packed = PackedLinear(self._plain, None)
        self._may_screen = can_screen(self._plain)
        self._screen: OutputScreen | None = None
        self._num_small = 0
        self._longest = math.nan  # the longest row, which only rounded logits ask for
        if self._plain.dtype == torch.bfloat16:
            self._longest = float(torch.linalg.vector_norm(self._plain, dim=1, dtype=torch.float32).amax())

    def choose(self, hidden: Tensor, forbidden: list[int]) -> Tensor:
        """The best tokens (R,) after hidden states (R, D), exactly: see `screening`."""
        screen = self._find_screen(len(hidden))
        if screen is not None:
            chosen = screen.choose(hidden, forbidden)
            if None not in chosen:
                return torch.tensor(chosen)
        logits = self.project(hidden)
        logits[:, forbidden] = -math.inf
        if logits.dtype == torch.bfloat16:
            return choose_among_rounded(logits, hidden, self._plain, self._longest)
        return find_largest(logits)

    def _find_screen(self, num_rows: int) -> OutputScreen | None:
        """What finds the best tokens of so few hidden states faster than `project`, once they are asked for so often
        that making it pays."""
        if num_rows > MAX_ROWS or not self._may_screen:
            return None
        self._num_small += 1
        if self._screen is None and self._num_small > _SCREEN_AFTER:
            self._screen = OutputScreen(self._plain)
        return self._screen

    def matrix(self) -> Tensor:
        """(V, D)"""
        return self._plain

    def decoding_matrix(self) -> Tensor | None:
        """None: `project` is faster without."""
        return None

    def embed(self, ids: Tensor, matrix: Tensor | None = None) -> Tensor:
        """ids (...) -> (..., D)."""
        return functional.embedding(ids, self._plain)

    def round_hidden(self, hidden: Tensor) -> Tensor:
        """Nothing is rounded."""
        return hidden

    def project(self, hidden: Tensor, matrix: Tensor | None = None) -> Tensor:
        """Logits: hidden (..., D) -> (..., V)."""
        logits: Tensor = self._packed(hidden)
        return logits


def pack_layers(model: nn.Module) -> dict[nn.Module, nn.Module]:
    """Exchange the layers of a model that gain by it; returns each new one with the one that it stands for."""
    found: dict[nn.Module, nn.Module] = {}
    for layer in model.modules():
        if isinstance(layer, QuantizableLinear) and _gains(layer):
            found[PackedLinear(layer.weight, layer.bias)] = layer
        elif isinstance(layer, TiedEmbedding) and _gains(layer):
            found[PackedEmbedding(layer)] = layer
    replace_layers(model, {id(layer): packed for packed, layer in found.items()})
    return found


@contextlib.contextmanager
def packed_layers(model: nn.Module) -> Iterator[None]:
    """Within, the model computes with packed layers."""
    found = pack_layers(model)
    try:
        yield
    finally:
        replace_layers(model, {id(packed): layer for packed, layer in found.items()})


def _gains(layer: QuantizableLinear | TiedEmbedding) -> bool:
    weight = layer.weight
    least = _LEAST_ELEMENTS.get(weight.dtype)
    if layer.fake_quantization or weight.device.type != "cpu" or least is None or weight.numel() < least:
        return False
    return _has_products(weight.dtype)


def _has_products(dtype: torch.dtype) -> bool:
    """Whether this PyTorch on this processor multiplies packed weights of a type."""
    operations = torch.ops.mkldnn
    if not torch.backends.mkldnn.is_available() or not hasattr(operations, "_linear_pointwise"):  # type: ignore[no-untyped-call]
        return False
    return dtype == torch.float32 or bool(operations._is_mkldnn_bf16_supported())
