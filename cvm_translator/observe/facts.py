"""Everything a report tells, read once from a run folder.

Guarantees: a file that is not there yet is an empty dictionary (its section then says `not measured`); one that is
there but cannot be read is an error that names it. Nothing is written.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

from cvm_translator.errors import RunFolderError
from cvm_translator.observe.advice import AdviceFacts
from cvm_translator.observe.history import History, of_stage, read_history
from cvm_translator.observe.text import as_number, is_known
from cvm_translator.runs.layout import RunLayout

NUM_STRETCHES = 10


@dataclass(frozen=True)
class Facts:
    """The files of one run folder as plain data."""

    layout: RunLayout
    history: History
    config: Mapping[str, Any]
    environment: Mapping[str, Any]
    final: Mapping[str, Any]
    """reports/final_report.json, written by the pipeline after the gate."""
    filters: Mapping[str, Any]
    manifest: Mapping[str, Any]
    metadata: Mapping[str, Any]
    validations: Mapping[str, Mapping[str, Any]]
    """validation/*.json by file name without the ending."""

    def setting(self, path: str, default: Any = None) -> Any:
        """A setting by its dotted name."""
        return dig(self.config, path, default)

    @cached_property
    def deployed(self) -> str:
        """Which model was gated: the quantised student where there is one, else the float one."""
        names = [name for name in (self.final.get("test") or {}) if name not in ("teacher", "float")]
        return str(self.final.get("deployed") or (names[0] if names else "float"))

    @property
    def threshold(self) -> float:
        thresholds = [as_number(value) for value in (dig(self.final, "gate.thresholds") or {}).values()]
        known = [value for value in thresholds if math.isfinite(value)]
        return known[0] if known else as_number(self.setting("guard.quality_threshold", 0.9))

    @property
    def quantised_from(self) -> int | None:
        """The step from which on training saw fake quantisation, or None where it never did."""
        if self.setting("quantization.method") == "progressive":
            verdicts = of_stage(self.history.verdicts, "distil")
            wide = [event["step"] for event in verdicts if event.get("bits") == 16]
            return max(wide) + 1 if len(wide) < len(verdicts) and wide else None
        share = as_number(self.setting("quantization.start_fraction"))
        total = as_number(self.setting("distillation.num_iterations"))
        if self.setting("quantization.method") != "qat" or not math.isfinite(share * total):
            return None
        return int(share * total) + 1

    @property
    def rollbacks(self) -> list[dict[str, Any]]:
        """From the events, which name both steps; where they are gone, from the final report."""
        return [*of_stage(self.history.rollbacks, "distil")] or list(self.final.get("rollbacks") or [])


def dig(data: Any, path: str, default: Any = None) -> Any:
    """The value at a dotted path of nested dictionaries, or `default`."""
    for key in path.split("."):
        if not isinstance(data, Mapping) or key not in data:
            return default
        data = data[key]
    return data


def read_facts(run_dir: str | Path) -> Facts:
    """Read a run folder; refuse one in which nothing has been run."""
    layout = RunLayout(Path(run_dir))
    history = read_history(layout.events)
    final = read_optional_json(layout.final_report)
    if not history.num_events and not final:
        raise RunFolderError(
            f"{layout.root} holds no run (no events in {layout.events}): name the --output-dir of a run, or start one"
        )
    found = sorted(layout.validation.glob("*.json")) if layout.validation.is_dir() else []
    return Facts(
        layout=layout,
        history=history,
        config=_read_yaml(layout.config),
        environment=read_optional_json(layout.environment),
        final=final,
        filters=read_optional_json(layout.corpus / "filters.json"),
        manifest=read_optional_json(layout.corpus / "manifest.json"),
        metadata=read_optional_json(layout.student / "metadata.json"),
        validations={path.stem: read_optional_json(path) for path in found},
    )


def read_optional_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise RunFolderError(f"{path} is no JSON ({error}): remove it or write it again") from error
    return data if isinstance(data, dict) else {"value": data}


def _read_yaml(path: Path) -> dict[str, Any]:
    import yaml

    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (ValueError, yaml.YAMLError) as error:
        raise RunFolderError(f"{path} is no YAML ({error}): restore the config of the run") from error
    return data if isinstance(data, dict) else {}


def gather_advice_facts(facts: Facts) -> AdviceFacts:
    """The figures that advice is drawn from."""
    test, models = facts.final.get("test") or {}, facts.final.get("models") or {}
    student = models.get(facts.deployed) or {}
    teacher_size = as_number((models.get("teacher") or {}).get("num_parameters"))
    float_quality = as_number(dig(test, "float.retentions.quality_score.value"))
    quality = as_number(dig(test, f"{facts.deployed}.retentions.quality_score.value"))
    start = facts.setting("quantization.start_fraction") if facts.setting("quantization.method") == "qat" else None
    curve = facts.history.curves.get("distil")
    return AdviceFacts(
        temperature=as_number(facts.setting("distillation.temperature")),
        losses=mean_stretches(facts.history),
        qualities=[as_number(v.get("quality_score")) for v in facts.history.student_validations()],
        retention=quality,
        teacher_bleu=as_number(dig(test, "teacher.scores.bleu.value")),
        compression=teacher_size / as_number(student["num_parameters"])
        if as_number(student.get("num_parameters")) > 0
        else math.nan,
        quantisation_gap=float_quality - quality if facts.deployed != "float" else math.nan,
        quantisation_start=as_number(start),
        skipped_share=sum(curve.skipped) / len(curve) if curve else math.nan,
        gradient_ratio=as_number(dig(facts.final, "preflight.gradient_ratio")),
        num_rollbacks=len(facts.rollbacks),
        halted=bool(facts.final.get("halted")),
    )


def mean_stretches(history: History) -> list[float]:
    """Mean training loss of ten equal stretches of the student's own history."""
    curve = history.curves.get("distil")
    if curve is None:
        return []
    losses = [curve.columns["loss"][row] for row in curve.kept_rows()]
    losses = [loss for loss in losses if math.isfinite(loss)]
    if len(losses) < NUM_STRETCHES:
        return losses
    edges = [index * len(losses) // NUM_STRETCHES for index in range(NUM_STRETCHES + 1)]
    return [fmean(losses[low:high]) for low, high in itertools.pairwise(edges)]


def flatten(data: Any, prefix: str = "") -> list[tuple[str, str]]:
    """Nested plain data as dotted names and text, for tables; a list's plain entries stay on one line each."""
    if isinstance(data, Mapping) and data:
        return [row for key, value in data.items() for row in flatten(value, f"{prefix}.{key}" if prefix else str(key))]
    if isinstance(data, list) and any(isinstance(item, Mapping | list) for item in data):
        rows: list[tuple[str, str]] = []
        for index, item in enumerate(data):
            name = f"{prefix}[{index}]"
            is_plain = isinstance(item, Mapping) and not any(
                isinstance(value, Mapping | list) for value in item.values()
            )
            rows += [(name, _join(item))] if is_plain else flatten(item, name)
        return rows
    return [(prefix, _show(data))]


def _join(entry: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {_show(value)}" for key, value in entry.items() if value is not None)


def _show(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(_show(item) for item in value) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float) and is_known(value):
        return f"{value:g}"
    return "–" if value is None or value == {} else str(value)
