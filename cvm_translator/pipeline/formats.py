"""From a run's quantisation settings to what rounds, converts and names its student.

The student that a validation scores and the one that is delivered are made here by one function, so that they are in
the same number format.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor, nn

from cvm_translator.config.schema import TRAINED_METHODS, QuantizationConfig, RunConfig
from cvm_translator.corpus.dataset import Batch, DistillationDataset
from cvm_translator.errors import ConfigError
from cvm_translator.models.transformer import CvmTransformer
from cvm_translator.quantization import (
    AdvancedQuantizer,
    MemoryOptimizedQuantizer,
    Plan,
    QuantizationType,
    check_plan,
    convert_with_plan,
    describe_plan,
    parse_plan,
)
from cvm_translator.runs import atomic
from cvm_translator.training.judges import Deploy
from cvm_translator.training.objectives import find_real_targets
from cvm_translator.training.setup import leave_as_it_is
from cvm_translator.training.widths import UNROUNDED_BITS, WidthCourse

CALIBRATION_BATCH = 32
CALIBRATION_STREAM = 4
"""Sets the choice of sentences apart from the other things that a run's seed decides."""


def build_course(config: RunConfig) -> WidthCourse:
    """The bit widths that training passes through; one that knows nothing of rounding where it is rounded later."""
    settings = config.quantization
    if settings.method not in TRAINED_METHODS:
        return WidthCourse((settings.bits,), first_step=config.distillation.num_iterations + 1)
    first_step = int(settings.start_fraction * config.distillation.num_iterations) + 1
    return WidthCourse(settings.width_schedule, first_step)


def build_quantizer(settings: QuantizationConfig, bits: int) -> AdvancedQuantizer:
    """The quantiser at a width of the course; 16 bits are float16 weights, whatever the method."""
    method = QuantizationType.WEIGHT_ONLY if bits == UNROUNDED_BITS else QuantizationType(settings.method)
    group_size = None if settings.group_size == "row" else settings.group_size
    return AdvancedQuantizer(method, bits, group_size=group_size, symmetric=settings.symmetric)


def build_prepare(settings: QuantizationConfig) -> Callable[[CvmTransformer, int], object]:
    """Makes a model's forward pass round as the deployed one will at some width; at UNROUNDED_BITS not at all."""
    if settings.method not in TRAINED_METHODS:
        return leave_as_it_is
    quantizer = build_quantizer(settings, settings.bits)

    def prepare(model: CvmTransformer, bits: int) -> None:
        if bits == UNROUNDED_BITS:
            model.set_fake_quantization(False)
        else:
            quantizer.prepare(model, bits=bits)

    return prepare


def build_deploy(settings: QuantizationConfig, calibration: Calibration) -> Deploy:
    """From the float student to a copy as it is deployed at some width."""
    if settings.method == "none":
        return lambda model, bits: model
    if settings.method == "mixed":
        return lambda model, bits: convert_with_plan(
            model, choose_plan(settings, model, calibration)["plan"], calibration.run
        )
    return lambda model, bits: build_quantizer(settings, bits).convert(model, calibration.run)


def check_settings(settings: QuantizationConfig, model: CvmTransformer) -> None:
    """Refuse a named plan that does not fit the model, before anything is trained. Raises ConfigError."""
    if settings.plan is not None:
        plan = load_plan(settings.plan)
        try:
            check_plan(model, plan)
        except ValueError as error:
            raise ConfigError(f"{settings.plan}: {error}") from error


def choose_plan(settings: QuantizationConfig, model: CvmTransformer, calibration: Calibration) -> dict[str, Any]:
    """Method mixed: the plan that is named, or the one that meets the target with the least loss, and what it costs."""
    if settings.plan is not None:
        plan = describe_plan(model, load_plan(settings.plan))
        return plan | {"message": f"plan of {settings.plan}: {plan['message']}"}
    quantizer = MemoryOptimizedQuantizer(settings.target_compression_ratio, target_megabytes=settings.target_megabytes)
    return quantizer.plan(model, calibration.compute_logits)


def name_format(settings: QuantizationConfig, bits: int) -> str | None:
    """The folder of the deployed student: int8, int4, float16 or mixed; None where only the float one is wanted."""
    if settings.method == "none":
        return None
    return "mixed" if settings.method == "mixed" else "float16" if bits == UNROUNDED_BITS else f"int{bits}"


class Calibration:
    """A fixed choice of training sentences, which runs through models teacher-forced."""

    def __init__(self, dataset: DistillationDataset, num_sentences: int, seed: int) -> None:
        chosen = np.random.default_rng([seed, CALIBRATION_STREAM]).permutation(len(dataset))[:num_sentences]
        self._chosen = chosen[np.argsort(dataset.lengths[chosen, 1], kind="stable")]
        self._dataset = dataset

    @torch.no_grad()
    def run(self, model: nn.Module) -> None:
        """Put the sentences through the model."""
        for batch in self._batches(model):
            model(batch.src, batch.src_mask, batch.tgt_in)

    @torch.no_grad()
    def compute_logits(self, model: nn.Module) -> Tensor:
        """Logits (N, V) at the real target tokens."""
        logits = []
        for batch in self._batches(model):
            hidden, matrix = model(batch.src, batch.src_mask, batch.tgt_in)
            logits.append(hidden.flatten(0, 1)[find_real_targets(batch)] @ matrix.T)
        return torch.cat(logits)

    def _batches(self, model: nn.Module) -> Iterator[Batch]:
        device = next(iter(model.state_dict().values())).device
        for start in range(0, len(self._chosen), CALIBRATION_BATCH):
            yield self._dataset.batch(self._chosen[start : start + CALIBRATION_BATCH]).to(device)


def load_plan(path: Path) -> Plan:
    """The plan in a file written by `save_plan`, perhaps edited since; the rest of the file may no longer hold."""
    try:
        plan = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: cannot be read as a quantisation plan ({error})") from error
    if not isinstance(plan, dict) or not isinstance(plan.get("plan"), dict):
        raise ConfigError(f"{path}: is no quantisation plan, which maps each layer to its format under `plan`")
    try:
        return parse_plan(plan["plan"])
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from error


def save_plan(path: Path, plan: dict[str, Any]) -> None:
    atomic.write_text(path, yaml.safe_dump(plan, sort_keys=False, allow_unicode=True))
