"""Choosing the format of each layer so that a model fits a size with the least harm to what it outputs.

Each layer is tried alone in each format (`OPTIONS`: 16, 8 and 4 bits, these in finer and coarser groups), all others
in float, and calibration data runs through the model: its *loss* is the Kullback-Leibler divergence of the output
distributions from the float model's, in nats a token. Rounding errors of different layers are independent, so their
losses nearly add up; the plan has the least sum of all plans that fit (dynamic programming over bytes, in steps of
1/65,536 of the target). What the whole plan loses together is measured at the end.

When the target is out of reach, the plan is the smallest model, and says so. The plan is plain data: written to a file,
edited and read again, it goes to `convert_with_plan` or to `AdvancedQuantizer(method "mixed", plan=…)`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from cvm_translator.quantization.convert import (
    convert_with_plan,
    count_bytes,
    deploy,
    find_layers,
    replace_layers,
    set_fake_quantization,
)
from cvm_translator.quantization.deployed import DeployedLinear
from cvm_translator.quantization.formats import FLOAT16, INT8, LayerFormat, Plan, plan_to_plain

ModuleT = TypeVar("ModuleT", bound=nn.Module)

ComputeLogits = Callable[[nn.Module], Tensor]
"""Runs calibration data through the model that it is given, teacher-forced: logits (N, V), the same N tokens each
time."""

OPTIONS: tuple[LayerFormat, ...] = (
    FLOAT16,
    INT8,
    *(LayerFormat("int4", size, symmetric=False) for size in (16, 32, 64, 128, None)),
    LayerFormat("int4", None),
)
"""What each layer is tried in. Asymmetric groups lose less than symmetric ones of half the size, which cost more."""
_NUM_BUCKETS = 1 << 16
_BLOCK_ROWS = 256


@dataclass(frozen=True)
class LayerOption:
    """A layer in one format: what it costs and what it loses when all others are float."""

    layer_format: LayerFormat
    num_bytes: int
    loss: float
    """Nats a token."""


class MemoryOptimizedQuantizer:
    """Plans the formats of a model's layers for a target: float32 bytes over deployed bytes, or megabytes (10⁶ bytes).

    Bytes are those of the weights file, its header included.
    """

    def __init__(
        self,
        target_compression_ratio: float | None = None,
        *,
        target_megabytes: float | None = None,
        options: Sequence[LayerFormat] = OPTIONS,
    ) -> None:
        if (target_compression_ratio is None) == (target_megabytes is None):
            raise ValueError("give either target_compression_ratio or target_megabytes")
        if target_compression_ratio is not None and not 1.0 <= target_compression_ratio < math.inf:
            raise ValueError(f"target_compression_ratio {target_compression_ratio} must be at least 1")
        if target_megabytes is not None and not 0.0 < target_megabytes < math.inf:
            raise ValueError(f"target_megabytes {target_megabytes} must be positive")
        if not options:
            raise ValueError("options must name at least one number format")
        self.target_compression_ratio, self.target_megabytes = target_compression_ratio, target_megabytes
        self.options = tuple(options)

    @torch.no_grad()
    def plan(self, model: nn.Module, compute_logits: ComputeLogits) -> dict[str, Any]:
        """The plan (`plan`, see `formats`) and what it costs, as JSON-compatible data; the model is left alone."""
        float_model = copy.deepcopy(model).eval()
        set_fake_quantization(float_model, False)
        measured = measure_layers(float_model, compute_logits, self.options)
        empty = copy.deepcopy(float_model).to("meta")
        float_bytes = count_bytes(empty)
        target_bytes = self._find_target(float_bytes)
        chosen = choose_formats(measured, target_bytes, lambda plan: count_bytes(convert_with_plan(empty, plan)))
        plan = _formats(chosen)
        num_bytes = count_bytes(convert_with_plan(empty, plan))
        reference, logits = compute_logits(float_model), compute_logits(convert_with_plan(float_model, plan))
        return {
            "target_bytes": target_bytes,
            "target_met": num_bytes <= target_bytes,
            "message": _describe_size(float_bytes, num_bytes, target_bytes),
            "float_bytes": float_bytes,
            "num_bytes": num_bytes,
            "compression_ratio": float_bytes / num_bytes,
            "loss_nats_per_token": compute_divergence(reference, logits),
            "sum_of_layer_losses": sum(option.loss for option in chosen.values()),
            "layers": {name: _describe_layer(option, measured[name]) for name, option in chosen.items()},
            "plan": plan_to_plain(plan),
        }

    def _find_target(self, float_bytes: int) -> int:
        if self.target_megabytes is not None:
            return int(self.target_megabytes * 1e6)
        assert self.target_compression_ratio is not None
        return int(float_bytes / self.target_compression_ratio)

    def convert(self, model: ModuleT, plan: Mapping[str, Any]) -> ModuleT:
        """A deep copy of the model in the formats of what `plan` returned, edited or not, in evaluation mode."""
        return convert_with_plan(model, plan["plan"])


def describe_plan(model: nn.Module, plan: Plan) -> dict[str, Any]:
    """A plan that was given and the size it makes, named as `MemoryOptimizedQuantizer.plan` names them.

    Raises ValueError where it is the plan of another model.
    """
    empty = copy.deepcopy(model).to("meta")
    float_bytes, num_bytes = count_bytes(empty), count_bytes(convert_with_plan(empty, plan))
    return {
        "message": _describe_size(float_bytes, num_bytes),
        "float_bytes": float_bytes,
        "num_bytes": num_bytes,
        "compression_ratio": float_bytes / num_bytes,
        "plan": plan_to_plain(plan),
    }


def choose_formats(
    measured: Mapping[str, Sequence[LayerOption]], target_bytes: int, count_plan_bytes: Callable[[Plan], int]
) -> dict[str, LayerOption]:
    """Each layer's option in the plan of least loss that `count_plan_bytes` finds to fit, or in the smallest."""
    smallest = {name: min(options, key=lambda o: (o.num_bytes, o.loss)) for name, options in measured.items()}
    others = count_plan_bytes(_formats(smallest)) - sum(option.num_bytes for option in smallest.values())
    budget = target_bytes - others  # what the layers may have; the rest is norms and the file's header
    while (picks := choose_options(list(measured.values()), budget)) is not None:
        chosen = {name: options[i] for (name, options), i in zip(measured.items(), picks, strict=True)}
        excess = count_plan_bytes(_formats(chosen)) - target_bytes
        if excess <= 0:
            return chosen
        budget -= excess  # another format has other tensors, which have other places in the header
    return smallest


def choose_options(layers: Sequence[Sequence[LayerOption]], budget: int) -> list[int] | None:
    """The index of each layer's option in the choice of least total loss within the budget; None if none fits."""
    if budget <= 0:
        return None
    unit = -(-budget // _NUM_BUCKETS)
    least = torch.zeros(budget // unit + 1, dtype=torch.float64)  # by bytes spent at most, in units
    picks: list[Tensor] = []
    for options in layers:
        candidates = torch.full((len(options), len(least)), math.inf, dtype=torch.float64)
        for row, option in zip(candidates, options, strict=True):
            cost = -(-option.num_bytes // unit)
            if cost < len(least):
                row[cost:] = least[: len(least) - cost] + option.loss
        least, pick = candidates.min(0)
        picks.append(pick)
    if least[-1] == math.inf:
        return None
    chosen: list[int] = []
    left = len(least) - 1
    for options, pick in zip(reversed(layers), reversed(picks), strict=True):
        chosen.append(int(pick[left]))
        left -= -(-options[chosen[-1]].num_bytes // unit)
    return chosen[::-1]


@torch.no_grad()
def measure_layers(
    model: nn.Module, compute_logits: ComputeLogits, options: Sequence[LayerFormat] = OPTIONS
) -> dict[str, list[LayerOption]]:
    """Bytes and loss of every layer in every format that can hold it, each alone in an otherwise float model."""
    trial = copy.deepcopy(model).eval()
    set_fake_quantization(trial, False)
    reference = compute_logits(trial)
    if not bool(reference.isfinite().all()):
        raise ValueError("the float model's logits on the calibration data are NaN or infinite: check model and data")
    return {
        name: _measure_layer(trial, name, layer, compute_logits, reference, options)
        for name, layer in find_layers(trial).items()
    }


def _measure_layer(
    trial: nn.Module,
    name: str,
    layer: nn.Module,
    compute_logits: ComputeLogits,
    reference: Tensor,
    options: Sequence[LayerFormat],
) -> list[LayerOption]:
    if isinstance(layer, DeployedLinear):
        raise ValueError(f"layer {name} is {layer.layer_format} already: give the float model")
    measured: list[LayerOption] = []
    problem = None
    for layer_format in options:
        try:
            deployed = deploy(name, layer, layer_format)
        except ValueError as error:  # too large for float16, say; another option may hold it
            problem = error
            continue
        replace_layers(trial, {id(layer): deployed})
        loss = compute_divergence(reference, compute_logits(trial))
        replace_layers(trial, {id(deployed): layer})
        measured.append(LayerOption(layer_format, sum(t.nbytes for t in deployed.state_dict().values()), loss))
    if not measured:
        raise ValueError(str(problem))
    return measured


def compute_divergence(reference: Tensor, logits: Tensor) -> float:
    """Mean KL(reference ‖ other) of two sets of logits (N, V), in nats a row."""
    if reference.shape != logits.shape or not len(reference):
        raise ValueError(f"calibration gave logits {list(logits.shape)} after {list(reference.shape)}: they must agree")
    total = 0.0
    for start in range(0, len(reference), _BLOCK_ROWS):
        rows = slice(start, start + _BLOCK_ROWS)
        log_p, log_q = reference[rows].float().log_softmax(-1), logits[rows].float().log_softmax(-1)
        total += (log_p.exp() * (log_p - log_q)).sum(dtype=torch.float64).item()
    return total / len(reference)


def _formats(chosen: Mapping[str, LayerOption]) -> Plan:
    return {name: option.layer_format for name, option in chosen.items()}


def _describe_size(float_bytes: int, num_bytes: int, target_bytes: int | None = None) -> str:
    size = f"{float_bytes / num_bytes:.2f} times smaller, {num_bytes:,} bytes"
    if target_bytes is None or num_bytes <= target_bytes:
        return size
    return f"{size}: the target of {target_bytes:,} bytes is out of reach, this is the smallest"


def _describe_layer(chosen: LayerOption, measured: Sequence[LayerOption]) -> dict[str, Any]:
    losses = {str(option.layer_format): option.loss for option in measured}
    return {"bits": chosen.layer_format.bits, "num_bytes": chosen.num_bytes, "loss_nats_per_token": losses}
