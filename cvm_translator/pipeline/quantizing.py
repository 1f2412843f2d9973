"""Quantising a trained student after the fact, judged as deployed before it is kept: `cvm-translator quantize`.

Guarantees: the float model is never touched; the quantised one is written beside the target, loaded from its files in a
fresh process, compared with the float one on sentences that training has not seen, and only then renamed into place.
One that loses or weighs more than was allowed is never written. Refuses models that are quantised already,
methods that belong to training, those that calibrate on sentences without any, and folders that exist.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cvm_translator.config.schema import TRAINED_METHODS, QuantizationConfig
from cvm_translator.corpus.build import load_split
from cvm_translator.corpus.dataset import DistillationDataset
from cvm_translator.corpus.records import Pair
from cvm_translator.errors import ConfigError, CorpusError, CvmError, ModelError
from cvm_translator.models.folder import LoadedModel, load_model, save_model
from cvm_translator.models.transformer import CvmTransformer
from cvm_translator.pipeline.comparison import FolderComparison, compare_folders, refuse_loss
from cvm_translator.pipeline.formats import Calibration, build_deploy, choose_plan, load_plan, save_plan
from cvm_translator.pipeline.places import find_float_folder, find_run, refuse_existing
from cvm_translator.pipeline.scoring import read_pairs
from cvm_translator.quantization import convert_with_plan
from cvm_translator.runs import atomic

PLAN_FILE = "quantization_plan.yaml"
CALIBRATION_SEED = 13


@dataclass(frozen=True)
class QuantizeRequest:
    """What `quantize` is asked for."""

    model: Path
    output: Path
    settings: QuantizationConfig
    calibration: Path | None = None
    """TSV of training pairs; default: those of the run that the model belongs to."""
    pairs: Path | None = None
    """TSV to be judged on; default: the validation set of the run that the model belongs to."""
    max_drop: float | None = None
    """BLEU points that may be lost; None: any."""


def quantize_folder(
    request: QuantizeRequest, report: Callable[[str], None], *, judge: bool = True
) -> FolderComparison | None:
    """Quantise, judge and keep; returns the comparison, or None where there was nothing to judge on.

    Without `judge` the model is only written: for callers that judge it themselves.
    """
    _refuse_trained(request.settings)
    source = find_float_folder(request.model)
    refuse_existing(request.output)
    judged_on = _find_pairs(request.pairs, source, "validation") if judge else None
    if judged_on is None and request.max_drop is not None:
        raise ConfigError(
            f"--max-drop: {source} belongs to no run, so name sentences to judge on with --pairs FILE.tsv"
        )
    loaded = load_model(source)
    calibration = _build_calibration(request, source, loaded)
    converted, plan = _convert(request, source, loaded, calibration)
    if plan is not None:
        report(plan["message"])
    described = loaded.config
    with atomic.new_folder(request.output) as folder:
        save_model(
            folder,
            converted,
            loaded.tokenizer,
            source_language=described["source_language"],
            target_language=described["target_language"],
            metadata=described["metadata"] | {"quantization": request.settings.model_dump(mode="json")},
        )
        if plan is not None:
            save_plan(folder / PLAN_FILE, plan)
        if judged_on is None:
            if judge:
                report(f"not judged: {source} belongs to no run; name sentences to judge on with --pairs FILE.tsv")
            return None
        comparison = compare_folders(source, folder, judged_on, described["target_language"])
        if request.max_drop is not None:
            remedy = "allow more, or choose another method"
            refuse_loss(comparison.differences["bleu"], request.max_drop, remedy)
    return comparison


def _refuse_trained(settings: QuantizationConfig) -> None:
    if settings.method in TRAINED_METHODS:
        raise ConfigError(
            f"method {settings.method} quantises while it trains: set quantization.method: {settings.method} in the"
            " config of a run (cvm-translator run), or choose dynamic, static, weight_only or mixed"
        )


def _refuse_out_of_reach(settings: QuantizationConfig, source: Path, plan: dict[str, Any]) -> None:
    """Raise ConfigError where the smallest plan is larger than was asked for."""
    if plan.get("target_met", True):
        return
    ratio, megabytes = settings.target_compression_ratio, settings.target_megabytes
    asked = f"--target-megabytes {megabytes:g}" if ratio is None else f"--target-ratio {ratio:g}"
    # rounded towards what can be had
    best_ratio = math.floor(plan["compression_ratio"] * 100) / 100
    best_megabytes = math.ceil(plan["num_bytes"] / 1000) / 1000
    raise ConfigError(
        f"{asked} is out of reach for {source}: the smallest has {plan['num_bytes']:,} bytes; ask for --target-ratio"
        f" {best_ratio:.2f} or less, or --target-megabytes {best_megabytes:.3f} or more"
    )


def _convert(
    request: QuantizeRequest, source: Path, loaded: LoadedModel, calibration: Calibration
) -> tuple[CvmTransformer, dict[str, Any] | None]:
    """The deployed model and, for method mixed, its plan."""
    settings = request.settings
    try:
        if settings.method != "mixed":
            return build_deploy(settings, calibration)(loaded.model, settings.bits), None
        plan = choose_plan(settings, loaded.model, calibration)
        _refuse_out_of_reach(settings, source, plan)
        return convert_with_plan(loaded.model, plan["plan"], calibration.run), plan
    except CvmError:
        raise
    except ValueError as error:  # layers that no grid can hold, a plan for another model, a quantised model
        raise ModelError(f"{settings.plan or source}: {error}") from error


def _find_pairs(named: Path | None, model: Path, split: str) -> Sequence[Pair] | None:
    if named is not None:
        return read_pairs(named)
    run = find_run(model)
    return None if run is None else load_split(run.corpus, split)


def _build_calibration(request: QuantizeRequest, source: Path, loaded: LoadedModel) -> Calibration:
    """Training sentences, none where nothing is calibrated on them.

    Raises ConfigError where there are none to be had or none are asked for, CorpusError where all are too long.
    """
    calibrated = _name_calibrated(request.settings)
    if calibrated is None and request.calibration is not None:
        raise ConfigError(
            f"--calibration {request.calibration}: method {request.settings.method} calibrates on nothing here: leave"
            " it out"
        )
    pairs = [] if calibrated is None else _find_pairs(request.calibration, source, "train")
    if pairs is None:
        raise ConfigError(
            f"{calibrated} calibrates on training sentences, and {source} belongs to no run:"
            " name some with --calibration FILE.tsv"
        )
    max_length = loaded.model.config.max_length
    dataset = DistillationDataset.from_pairs(pairs, loaded.tokenizer, max_length)
    if calibrated is not None and not len(dataset):
        raise CorpusError(
            f"{request.calibration or 'the training set of the run'}: all {len(pairs):,} pairs are longer than the"
            f" model's max_length {max_length} (in tokens): name shorter ones with --calibration FILE.tsv"
        )
    return Calibration(dataset, request.settings.calibration_sentences, CALIBRATION_SEED)


def _name_calibrated(settings: QuantizationConfig) -> str | None:
    """What needs training sentences, None for nothing."""
    if settings.plan is not None:
        kinds = {layer_format.kind for layer_format in load_plan(settings.plan).values()}
        return f"int8_static in {settings.plan}" if "int8_static" in kinds else None
    return f"method {settings.method}" if settings.method in ("static", "mixed") else None
