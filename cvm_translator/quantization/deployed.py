"""Linear layers and tied embeddings in their deployed number formats, all but the 4-bit ones.

A deployed layer holds its weights as stored, computes with exactly their dequantised values, and keeps its bias in
float32. In a state_dict it has `weight`, `bias` and what its format adds, such as `weight_scale` (one step a row).

Speed and memory. `int8` and `int8_static` multiply integers (`torch._int_mm` where it is exact) and need no float copy
of their weights. `float16` and `int8_weights` have no fast product on a CPU: the first use makes the float32 weights
and keeps them, so they run at the speed and in the memory of the float model (4 bytes a weight beside the stored 1 or
2) — those formats make files small. PyTorch's `_weight_int8pack_mm` would need no copy, but it dies of a segmentation
fault on memory-mapped weights, as `load_model` gives them (torch 2.13).

`int8_static` puts all activations of a layer on one grid, −128…127 with a zero point, found by calibration
(`calibration`): seven operations fewer a layer than finding each token's own. oneDNN's `qlinear_pointwise` was tried
for it and left: with AVX-512 and torch 2.13 it is slower than `_int_mm` for 1 to 640 rows of 256 × 256 (44 against 18
µs, 398 against 319 µs), with signed inputs over a hundred times slower, and for some shapes it has no such product.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from cvm_translator.quantization.formats import FLOAT16, INT8, LayerFormat
from cvm_translator.quantization.grid import (
    compute_static_grid,
    dequantize_int8,
    fake_quantize,
    linear_int8,
    multiply_int8,
    quantize_int8,
    quantize_static,
)


def check_weight(weight: Tensor) -> Tensor:
    """The weight without its history; ValueError if it cannot be rounded to any grid."""
    weight = weight.detach()
    if not weight.is_meta and not bool(weight.isfinite().all()):
        raise ValueError("the weights are NaN or infinite: use an earlier checkpoint of the model")
    return weight


class DeployedLinear(nn.Module):
    """y = x · Wᵀ + b with W (M, K) in a deployed format; see the module's docstring."""

    weight: Tensor
    bias: Tensor | None
    layer_format: LayerFormat
    in_features: int
    out_features: int

    def __init__(self, layer_format: LayerFormat, shape: torch.Size, bias: Tensor | None) -> None:
        super().__init__()
        self.layer_format = layer_format
        self.out_features, self.in_features = shape
        self.register_buffer("bias", None if bias is None else bias.detach().float().clone())
        self._prepared: Any = None
        """What the first use made of the stored tensors; forgotten when they change, move or are copied."""

    @classmethod
    def from_weight(cls, weight: Tensor, bias: Tensor | None, layer_format: LayerFormat) -> DeployedLinear:
        """Round a float layer's weight (M, K) to the nearest values of the format; ValueError where that is no good."""
        raise NotImplementedError

    def dequantized_weight(self) -> Tensor:
        """(M, K) float32: the values that are computed with."""
        raise NotImplementedError

    def dequantized_rows(self, index: Tensor) -> Tensor:
        """The given rows of it: (...) -> (..., K) float32."""
        return functional.embedding(index, self._dense_weight())

    def round_input(self, values: Tensor) -> Tensor:
        """What the layer's product sees of its inputs."""
        return values

    def forward(self, input: Tensor) -> Tensor:
        return functional.linear(input, self._dense_weight(), self.bias)

    def _dense_weight(self) -> Tensor:
        """`dequantized_weight`, made at the first use and kept."""
        if self._prepared is None:
            with torch.inference_mode(False), torch.no_grad():
                self._prepared = self.dequantized_weight()
        dense: Tensor = self._prepared
        return dense

    def _apply(self, *arguments: Any, **keywords: Any) -> Any:
        before = list(self._buffers.values())
        super()._apply(*arguments, **keywords)  # type: ignore[no-untyped-call]
        if any(new is not old for new, old in zip(self._buffers.values(), before, strict=True)):
            self._prepared = None  # not for nothing: every search asks for its device, and mostly nothing moves
        return self

    def _load_from_state_dict(self, *arguments: Any, **keywords: Any) -> None:
        self._prepared = None
        super()._load_from_state_dict(*arguments, **keywords)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_prepared": None}

    def extra_repr(self) -> str:
        features = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return f"{features}, {self.layer_format}"


class DeployedTiedEmbedding(DeployedLinear):
    """Mixed into a deployed layer without bias, makes it a `TiedEmbedding`: its rows embed, its product projects."""

    projects_integers = False
    """Whether the product is one of integers, so that decoding is faster without a float matrix."""

    def matrix(self) -> Tensor:
        """(V, D) float32."""
        return self.dequantized_weight() if self.projects_integers else self._dense_weight()

    def decoding_matrix(self) -> Tensor | None:
        """What `embed` and `project` are best given in every step of a search."""
        return None if self.projects_integers else self._dense_weight()

    def embed(self, ids: Tensor, matrix: Tensor | None = None) -> Tensor:
        return self.dequantized_rows(ids) if matrix is None else functional.embedding(ids, matrix)

    def round_hidden(self, hidden: Tensor) -> Tensor:
        return self.round_input(hidden)

    def project(self, hidden: Tensor, matrix: Tensor | None = None) -> Tensor:
        if matrix is not None:
            return functional.linear(self.round_input(hidden), matrix)
        logits: Tensor = self(hidden)
        return logits


class HalfLinear(DeployedLinear):
    """float16 weights; float activations."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__(FLOAT16, weight.shape, bias)
        self.register_buffer("weight", weight)

    @classmethod
    def from_weight(cls, weight: Tensor, bias: Tensor | None, layer_format: LayerFormat) -> HalfLinear:
        half = check_weight(weight).to(torch.float16)
        if not half.is_meta and not bool(half.isfinite().all()):
            raise ValueError("a weight is too large for float16 (65,504): use int8 or float32")
        return cls(half, bias)

    def dequantized_weight(self) -> Tensor:
        return self.weight.float()


class Int8Linear(DeployedLinear):
    """int8 weights, one step a row, and inputs quantised per token as they come."""

    weight_scale: Tensor

    def __init__(
        self, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, layer_format: LayerFormat = INT8
    ) -> None:
        super().__init__(layer_format, weight.shape, bias)
        self.register_buffer("weight", weight)
        self.register_buffer("weight_scale", weight_scale)

    @classmethod
    def from_weight(cls, weight: Tensor, bias: Tensor | None, layer_format: LayerFormat) -> Int8Linear:
        integers, steps = quantize_int8(check_weight(weight))
        return cls(integers, steps.flatten(), bias, layer_format)

    def dequantized_weight(self) -> Tensor:
        return dequantize_int8(self.weight, self.weight_scale[:, None])

    def dequantized_rows(self, index: Tensor) -> Tensor:
        return dequantize_int8(self.weight[index], self.weight_scale[index][..., None])

    def round_input(self, values: Tensor) -> Tensor:
        return fake_quantize(values)

    def forward(self, input: Tensor) -> Tensor:
        return linear_int8(input, self.weight, self.weight_scale, self.bias)


class Int8WeightLinear(Int8Linear):
    """The weights of `Int8Linear`; float activations."""

    def round_input(self, values: Tensor) -> Tensor:
        return values

    def forward(self, input: Tensor) -> Tensor:
        return DeployedLinear.forward(self, input)


class Int8StaticLinear(Int8Linear):
    """The weights of `Int8Linear`; inputs on one grid: value = (integer − input_zero) × input_scale."""

    input_scale: Tensor  # () float32, NaN until calibrated
    input_zero: Tensor  # () int8

    def __init__(self, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, layer_format: LayerFormat) -> None:
        super().__init__(weight, weight_scale, bias, layer_format)
        self.register_buffer("input_scale", torch.full((), math.nan, device=weight.device))
        self.register_buffer("input_zero", torch.zeros((), dtype=torch.int8, device=weight.device))

    def set_input_range(self, low: float, high: float) -> None:
        """Put inputs on the grid of low … high, which is widened to hold 0; what lies beyond is cut off."""
        step, zero = compute_static_grid(low, high)
        self.input_scale.fill_(step)
        self.input_zero.fill_(zero)
        self._prepared = None

    def round_input(self, values: Tensor) -> Tensor:
        return (self._quantize(values).float() - self.input_zero) * self.input_scale

    def _quantize(self, values: Tensor) -> Tensor:
        return quantize_static(values, self.input_scale, self.input_zero)

    def forward(self, input: Tensor) -> Tensor:
        # x · Wᵀ + b = (q − zero) · Qᵀ × steps + b, and zero · Qᵀ is the same for every input.
        if self._prepared is None:
            with torch.inference_mode(False), torch.no_grad():
                steps = self.weight_scale * self.input_scale  # (M,)
                offset = -self.weight.sum(1).float() * self.input_zero * steps
                self._prepared = steps, offset if self.bias is None else offset + self.bias
        steps, offset = self._prepared
        integers = self._quantize(input.reshape(-1, input.shape[-1]))
        output = torch.addcmul(offset, multiply_int8(integers, self.weight).float(), steps)
        return output.view(*input.shape[:-1], self.out_features)


class HalfTiedEmbedding(DeployedTiedEmbedding, HalfLinear):
    """`TiedEmbedding` with float16 rows."""


class Int8TiedEmbedding(DeployedTiedEmbedding, Int8Linear):
    """`TiedEmbedding` with int8 rows and hidden states quantised per token."""

    projects_integers = True


class Int8StaticTiedEmbedding(DeployedTiedEmbedding, Int8StaticLinear):
    """`TiedEmbedding` with int8 rows and hidden states on one grid."""

    projects_integers = True


class Int8WeightTiedEmbedding(DeployedTiedEmbedding, Int8WeightLinear):
    """`TiedEmbedding` with int8 rows and float hidden states."""
