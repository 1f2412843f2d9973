"""Choosing the bits of each layer so that a model fits a size: 16, 8 or 4, where they hurt least per byte saved.

Every linear layer starts at 16 bits (float16); the step down (16 → 8 → 4) with the least added error per byte saved
is taken until the target is met or nothing is left to take. A layer's error is the mean squared difference of its
output on calibration activations, relative to the output's mean square, so that layers of different scale compare;
without activations, the same of its weights. The tied embedding is always int8; norms and biases stay float32. When
the target is out of reach, the plan is the smallest model and says so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, TypedDict

import torch
from torch import Tensor, nn
from torch.nn import functional

from cvm_translator.quantization.four_bit import FourBitLinear
from cvm_translator.quantization.linear import Int8Linear, Int8TiedEmbedding, TiedEmbedding
from cvm_translator.quantization.quantizer import count_bytes, replace_modules


class HalfLinear(nn.Module):
    """A linear layer with float16 weights, multiplied in the type of its input."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> HalfLinear:
        weight = linear.weight.detach().to(torch.float16)
        if not bool(weight.isfinite().all()):
            raise ValueError("a weight is too large for float16 (65,504): keep the layer at 8 bits or float32")
        return cls(weight, None if linear.bias is None else linear.bias.detach().float().clone())

    def forward(self, input: Tensor) -> Tensor:
        return functional.linear(input, self.weight.to(input.dtype), self.bias)


class LayerOption(TypedDict):
    """What a layer costs at some bit width."""

    num_bytes: int
    error: float


BITS: dict[int, Callable[[nn.Linear], nn.Module]] = {
    16: HalfLinear.from_linear,
    8: Int8Linear.from_linear,
    4: FourBitLinear.from_linear,
}


@torch.no_grad()
def collect_activations(model: nn.Module, run: Callable[[], object], max_rows: int = 512) -> dict[str, Tensor]:
    """The inputs (N, K) of every linear layer, by name, while `run()` puts calibration data through the model."""
    rows: dict[str, list[Tensor]] = {}

    def watch(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(module: nn.Module, arguments: tuple[Any, ...]) -> None:
            seen = rows.setdefault(name, [])
            room = max_rows - sum(len(part) for part in seen)
            if room > 0:
                seen.append(arguments[0].detach().flatten(0, -2)[:room].float().clone())

        return hook

    handles = [m.register_forward_pre_hook(watch(n)) for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return {name: torch.cat(parts) for name, parts in rows.items()}


class MemoryOptimizedQuantizer:
    """Plans and applies bit widths for a target size, given as float32 bytes over deployed bytes."""

    def __init__(self, target_compression_ratio: float) -> None:
        if not 1.0 <= target_compression_ratio < math.inf:
            raise ValueError(f"target_compression_ratio {target_compression_ratio} must be at least 1")
        self.target_compression_ratio = target_compression_ratio

    def plan(self, model: nn.Module, activations: Mapping[str, Tensor] | None = None) -> dict[str, Any]:
        """Bits, bytes and error of each layer, totals, and whether the target is met.

        `activations` (see `collect_activations`) must name every linear layer; without them, weight errors decide.
        """
        options = measure_layers(model, activations)
        float_bytes = count_bytes(model)
        fixed_bytes = count_bytes(replace_modules(model, _without_linears))
        target_bytes = float_bytes / self.target_compression_ratio
        chosen = dict.fromkeys(options, 16)

        def total_bytes() -> int:
            return fixed_bytes + sum(options[name][bits]["num_bytes"] for name, bits in chosen.items())

        while total_bytes() > target_bytes:
            steps = [
                (_error_per_byte(options[name][bits], options[name][bits // 2]), name)
                for name, bits in chosen.items()
                if bits > 4 and options[name][bits // 2]["num_bytes"] < options[name][bits]["num_bytes"]
            ]
            if not steps:
                break
            chosen[min(steps)[1]] //= 2
        num_bytes = total_bytes()
        is_met = num_bytes <= target_bytes
        ratio = float_bytes / num_bytes
        return {
            "target_compression_ratio": self.target_compression_ratio,
            "compression_ratio": ratio,
            "target_met": is_met,
            "message": f"{ratio:.2f} times smaller"
            + ("" if is_met else f": {self.target_compression_ratio:g} times cannot be met, this is the smallest"),
            "float_bytes": float_bytes,
            "num_bytes": num_bytes,
            "measured": "weights" if activations is None else "outputs",
            "layers": {name: {"bits": bits, **options[name][bits]} for name, bits in chosen.items()},
        }

    def convert(self, model: nn.Module, plan: Mapping[str, Any]) -> nn.Module:
        """A deep copy of the model with the plan's number formats, in evaluation mode."""

        def replace(name: str, module: nn.Module) -> nn.Module | None:
            if isinstance(module, TiedEmbedding):
                return Int8TiedEmbedding.from_embedding(module)
            return BITS[plan["layers"][name]["bits"]](module) if isinstance(module, nn.Linear) else None

        return replace_modules(model, replace).eval()


@torch.no_grad()
def measure_layers(
    model: nn.Module, activations: Mapping[str, Tensor] | None = None
) -> dict[str, dict[int, LayerOption]]:
    """num_bytes and relative error of every linear layer at every bit width."""
    options: dict[str, dict[int, LayerOption]] = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        if activations is None:
            inputs = torch.eye(module.in_features, device=module.weight.device)  # the outputs are the weights
        elif name in activations:
            inputs = activations[name].to(module.weight.device)
        else:
            raise ValueError(f"activations of layer {name} are missing: it was not used by the calibration data")
        reference = functional.linear(inputs, module.weight)
        signal = reference.square().mean().item()
        bias = module.bias if module.bias is not None else reference.new_zeros(())
        options[name] = {}
        for bits, make in BITS.items():
            candidate = make(module)
            noise = (candidate(inputs) - bias - reference).square().mean().item()
            options[name][bits] = {"num_bytes": count_bytes(candidate), "error": noise / signal if signal else noise}
    return options


def _error_per_byte(now: LayerOption, then: LayerOption) -> float:
    return (then["error"] - now["error"]) / (now["num_bytes"] - then["num_bytes"])


def _without_linears(name: str, module: nn.Module) -> nn.Module | None:
    if isinstance(module, TiedEmbedding):
        return Int8TiedEmbedding.from_embedding(module)
    return nn.Identity() if isinstance(module, nn.Linear) else None
