"""The grids of static activations, from what layers are fed while calibration data runs through the float model.

A layer's grid spans the smallest and largest input seen, both drawn in by the factor that loses least: the squared
error of a sample of the inputs is tried for each. An outlier then costs its own error, not the precision of all others.
Refuses, with the layer's name: layers that the data did not reach, and inputs that are NaN or infinite.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from cvm_translator.quantization.grid import compute_static_grid, quantize_static
from cvm_translator.quantization.linear import TiedEmbedding

Calibrate = Callable[[nn.Module], object]
"""Puts calibration data through the model that it is given; what it returns is not looked at."""

ROWS_A_CALL = 64
MAX_VALUES = 1 << 18
"""Of each layer's sample: random rows of each call (of a fixed seed), values in all (1 MiB)."""
FACTORS = [1.0 - 0.025 * i for i in range(33)]


class _Watcher:
    """The range and a sample of a layer's inputs."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.low = self.high = 0.0
        self.num_seen = self.num_values = 0
        self.generator = torch.Generator().manual_seed(0)
        self.sample: list[Tensor] = []

    def see(self, values: Tensor) -> None:
        rows = values.detach().flatten(0, -2).float()  # (N, K)
        low, high = torch.stack(rows.aminmax()).tolist()
        if not (math.isfinite(low) and math.isfinite(high)):
            raise ValueError(f"layer {self.name} is fed NaN or infinite values: check model and calibration data")
        self.low, self.high = min(self.low, low), max(self.high, high)
        self.num_seen += rows.numel()
        if self.num_values < MAX_VALUES:
            chosen = torch.randperm(len(rows), generator=self.generator)[:ROWS_A_CALL]
            self.sample.append(rows[chosen.to(rows.device)])
            self.num_values += self.sample[-1].numel()

    def choose_range(self) -> tuple[float, float]:
        """The range whose grid loses least."""
        if not self.sample:
            raise ValueError(f"layer {self.name} is not reached by the calibration data: give data that reaches it")
        values = torch.cat([part.flatten() for part in self.sample])
        extremes = values.new_tensor([self.low, self.high])  # the sample may have missed them

        def compute_loss(factor: float) -> float:
            low, high = self.low * factor, self.high * factor
            missed = compute_rounding_loss(extremes, low, high) * len(extremes) / self.num_seen
            return compute_rounding_loss(values, low, high) + missed

        best = min(FACTORS, key=compute_loss)
        return self.low * best, self.high * best


def compute_rounding_loss(values: Tensor, low: float, high: float) -> float:
    """Mean squared error of values on the static grid of low … high."""
    step, zero = (values.new_tensor(number) for number in compute_static_grid(low, high))
    restored = (quantize_static(values, step, zero).float() - zero) * step
    return (restored - values).square().mean().item()


@torch.no_grad()
def find_input_ranges(
    model: nn.Module, layers: Mapping[str, nn.Module], calibrate: Calibrate
) -> dict[str, tuple[float, float]]:
    """The input range of each of the given layers of the model while `calibrate(model)` runs."""
    watchers = {name: _Watcher(name) for name in layers}
    handles = []
    try:
        for name, layer in layers.items():
            if isinstance(layer, TiedEmbedding):
                layer.watch_hidden = watchers[name].see
            else:
                handles.append(layer.register_forward_pre_hook(_build_hook(watchers[name].see)))
        calibrate(model)
    finally:
        for handle in handles:
            handle.remove()
        for layer in layers.values():
            if isinstance(layer, TiedEmbedding):
                layer.watch_hidden = None
    return {name: watcher.choose_range() for name, watcher in watchers.items()}


def _build_hook(see: Callable[[Tensor], None]) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def hook(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        see(arguments[0])

    return hook
