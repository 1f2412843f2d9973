"""The models that the quantisation benchmark compares, for each finished run: the rows of its table.

A row is a name and, for each run, a model folder: the run's float student, that student in every format that needs no
training, and the student of a run that trained at 4 bits. Guarantees: all runs have the same rows; a quantised model is
kept under the hash of the float weights and the settings that it was made from; a student that trained at 4 bits meets
the float student rounded to the same grid, and each mixed one meets uniform 4-bit models of its size on both kinds of
grid.

Refuses unfinished runs, a model that is given twice, different test sets, and students of --qat4 that did not train on
one 4-bit grid.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import BenchmarkError
from cvm_translator.config.load import build_quantization
from cvm_translator.config.schema import TRAINED_METHODS
from cvm_translator.models.description import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    build_empty_model,
    load_model_config,
    read_plan,
)
from cvm_translator.pipeline.quantizing import QuantizeRequest, quantize_folder
from cvm_translator.quantization import LayerFormat, convert_with_plan, count_bytes, find_plan
from cvm_translator.runs import atomic
from cvm_translator.runs.layout import RunLayout

FLOAT, INT8, QAT4 = "float32", "dynamic 8", "trained at 4 bits"
METHODS: dict[str, dict[str, Any]] = {
    "weight-only 16": {"method": "weight_only", "bits": 16},
    INT8: {"method": "dynamic", "bits": 8},
    "static 8": {"method": "static", "bits": 8},
    "weight-only 8": {"method": "weight_only", "bits": 8},
}
"""Rows with one format for all layers but for those on 4-bit grids, and their settings of `quantize`."""
UNIFORM, UNIFORM_ZEROS = LayerFormat("int4", 64), LayerFormat("int4", 64, symmetric=False)
GRIDS = (LayerFormat("int4", 32), UNIFORM, LayerFormat("int4", 128), LayerFormat("int4", None), UNIFORM_ZEROS)
MIXED = "mixed, 6 times smaller"
MIXED_SETTINGS: dict[str, Any] = {"method": "mixed", "target_compression_ratio": 6.0}
MIXED_AS_SMALL = {
    "mixed, the bytes of uniform 4": UNIFORM,
    "mixed, the bytes of uniform 4 with zero points": UNIFORM_ZEROS,
}
OPPONENT_GROUPS = (8, 10, 12, 14, 16, 18, 20, 22, 24, 28, 32)
"""Group sizes among which uniform opponents of MIXED are looked for: they are 4.5 to 7 bits a weight."""
MAX_SHARE_BELOW = 0.02
"""By how much such an opponent may be smaller."""


@dataclass(frozen=True)
class Student:
    """A run, one of the same config that trained at 4 bits, and the folder for what is made and measured of them."""

    run: RunLayout
    qat4: RunLayout | None
    work: Path

    @property
    def model(self) -> Path:
        return self.run.student / "float"

    @property
    def qat4_model(self) -> Path | None:
        return None if self.qat4 is None else self.qat4.student / "int4"


@dataclass(frozen=True)
class Lineup:
    """Which 4-bit rows there are, and what is compared beside every row with float; the same for all runs."""

    grids: tuple[LayerFormat, ...]
    rounded: str | None
    """The float student rounded to the grid of QAT4; None where none trained at 4 bits."""
    equal_bytes: tuple[tuple[str, str], ...]
    """A mixed row and a uniform one of its size."""


# ------------------------------------------------------------------------------------------------------------- students


def open_students(runs: Sequence[Path], qat4: Sequence[Path], work: Path) -> list[Student]:
    """One for each run, in their order. Raises BenchmarkError where they cannot be compared."""
    if qat4 and len(qat4) != len(runs):
        raise BenchmarkError(
            f"--qat4 names {len(qat4)} runs and --run {len(runs)}: give one for each, in the same order, or none"
        )
    layouts = [RunLayout(run.resolve()) for run in runs]
    trained = [RunLayout(run.resolve()) for run in qat4]
    folders = [layout.student / "float" for layout in layouts] + [layout.student / "int4" for layout in trained]
    hashes = [hash_weights(folder) for folder in folders]
    for number, digest in enumerate(hashes):
        if digest in hashes[:number]:
            raise BenchmarkError(
                f"{folders[number]} and {folders[hashes.index(digest)]} hold the same model: name each run once"
            )
    _check_test_sets([*layouts, *trained])
    return [
        Student(layout, trained[number] if trained else None, work.resolve() / hashes[number][:16])
        for number, layout in enumerate(layouts)
    ]


def hash_weights(folder: Path) -> str:
    """SHA-256 of a model folder's weights."""
    weights = folder / WEIGHTS_FILE
    if not weights.is_file():
        raise BenchmarkError(f"{folder} holds no model: name finished runs, with --qat4 those of quantization.bits=4")
    return atomic.sha256_file(weights)


def hash_test_set(run: RunLayout) -> str:
    path = run.corpus / "test.tsv"
    if not path.is_file():
        raise BenchmarkError(f"{path} is missing: name finished runs")
    return atomic.sha256_file(path)


def _check_test_sets(runs: Sequence[RunLayout]) -> None:
    for run in runs[1:]:
        if hash_test_set(run) != hash_test_set(runs[0]):
            raise BenchmarkError(f"{run.root} has another test set than {runs[0].root}: name runs of one corpus")


def find_grid(folder: Path) -> LayerFormat:
    """The one 4-bit grid that a model was trained on. Raises BenchmarkError where there is none."""
    config = load_model_config(folder)
    formats = set((read_plan(config, folder / CONFIG_FILE) or {}).values())
    if len(formats) != 1 or {grid.kind for grid in formats} != {"int4"}:
        found = ", ".join(sorted(map(str, formats))) or config["number_format"]
        raise BenchmarkError(f"{folder} is {found}: --qat4 needs runs with all layers on one 4-bit grid")
    method = config.get("metadata", {}).get("quantization", {}).get("method")
    if method not in TRAINED_METHODS:
        raise BenchmarkError(
            f"{folder} was rounded after training (method {method}): --qat4 needs runs of method"
            f" {' or '.join(TRAINED_METHODS)}"
        )
    return formats.pop()


def _find_common_grid(students: Sequence[Student]) -> LayerFormat | None:
    grids = {student.qat4_model: find_grid(student.qat4_model) for student in students if student.qat4_model}
    if len(set(grids.values())) > 1:
        raise BenchmarkError(
            "the runs of --qat4 trained on different grids: "
            + ", ".join(f"{folder} ({grid})" for folder, grid in grids.items())
        )
    return next(iter(grids.values()), None)


# ----------------------------------------------------------------------------------------------------------------- rows


def name_grid(grid: LayerFormat) -> str:
    """The row of a student rounded to a 4-bit grid."""
    group = "a whole row" if grid.group_size is None else f"groups of {grid.group_size}"
    return f"weight-only 4, {group}" + ("" if grid.symmetric else ", zero points")


def build_lineup(students: Sequence[Student]) -> Lineup:
    """The rows for these runs; makes the first run's MIXED model, whose size its opponents must have."""
    trained = _find_common_grid(students)
    mixed = _quantize(students[0], MIXED, MIXED_SETTINGS)
    opponents = find_opponents(students[0].model, count_weights(mixed))
    equal_bytes = [(MIXED, name_grid(grid)) for grid in opponents]
    equal_bytes += [(name, name_grid(grid)) for name, grid in MIXED_AS_SMALL.items()]
    grids = dict.fromkeys((*GRIDS, *opponents, *([] if trained is None else [trained])))
    return Lineup(tuple(grids), None if trained is None else name_grid(trained), tuple(equal_bytes))


def find_opponents(model: Path, num_bytes: int) -> list[LayerFormat]:
    """The symmetric 4-bit grid and the one with zero points that bring a float model nearest to a size."""
    empty = build_empty_model(load_model_config(model), model)
    layers = find_plan(empty)
    opponents = []
    for symmetric in (True, False):
        grids = [LayerFormat("int4", size, symmetric) for size in OPPONENT_GROUPS]
        sizes = {grid: count_bytes(convert_with_plan(empty, dict.fromkeys(layers, grid))) for grid in grids}
        large_enough = [grid for grid in grids if sizes[grid] >= (1.0 - MAX_SHARE_BELOW) * num_bytes]
        opponents.append(min(large_enough, key=lambda grid: abs(sizes[grid] - num_bytes)))
    return opponents


def build_folders(student: Student, lineup: Lineup) -> dict[str, Path]:
    """The model folder of every row, made where it is not there yet."""
    folders, own = {FLOAT: student.model}, find_own(student)
    for name, settings in METHODS.items():
        folders[name] = own.get(name) or _quantize(student, name, settings)
    for grid in lineup.grids:
        name = name_grid(grid)
        size = "row" if grid.group_size is None else grid.group_size
        settings = {"method": "weight_only", "bits": 4, "group_size": size, "symmetric": grid.symmetric}
        folders[name] = _quantize(student, name, settings)
    folders[MIXED] = _quantize(student, MIXED, MIXED_SETTINGS)
    for name, grid in MIXED_AS_SMALL.items():
        target = count_weights(folders[name_grid(grid)]) / 1e6
        folders[name] = _quantize(student, name, {"method": "mixed", "target_megabytes": target})
    if student.qat4_model is not None:
        folders[QAT4] = student.qat4_model
    return folders


def find_own(student: Student) -> dict[str, Path]:
    """The row that the run delivered itself, where it is one of METHODS."""
    folder = student.run.student / "int8"
    is_dynamic = (folder / CONFIG_FILE).is_file() and load_model_config(folder)["number_format"] == "int8"
    return {INT8: folder} if is_dynamic else {}


def _quantize(student: Student, name: str, settings: Mapping[str, Any]) -> Path:
    checked = build_quantization(dict(settings))
    key = atomic.sha256_json(checked.model_dump(mode="json"))[:8]
    output = student.work / f"{name_file(name)}_{key}"
    if not output.exists():
        output.parent.mkdir(parents=True, exist_ok=True)
        # judged with all others, on the test set
        quantize_folder(QuantizeRequest(student.model, output, checked), print, judge=False)
    return output


def count_weights(folder: Path) -> int:
    """Bytes of a model folder's weights."""
    return (folder / WEIGHTS_FILE).stat().st_size


def name_file(row: str) -> str:
    return row.replace(",", "").replace(" ", "_")
