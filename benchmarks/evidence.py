"""What finished arms left behind: their figures, paired comparisons on the test set, tables and result files.

Guarantees: two arms are compared on the same sentences or not at all, by the statistics of what the delivered student
wrote, under one resampling matrix with a fixed seed.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import REPOSITORY, RESULTS, Arm, BenchmarkError
from cvm_translator.corpus.build import load_split
from cvm_translator.metrics import MetricOptions, build_metrics
from cvm_translator.metrics.base import FloatArray, Metric
from cvm_translator.metrics.resampling import PairedComparison, paired_bootstrap, resampling_counts
from cvm_translator.runs import atomic
from cvm_translator.runs.events import read_events

NUM_DRAWS = 10_000
DRAWS_SEED = 13
SIGNIFICANCE = 0.05
COMPARED = ("bleu", "chrf")
DOCUMENT = REPOSITORY / "docs" / "performance.md"


# -------------------------------------------------------------------------------------------------------------- figures


def read_report(arm: Arm) -> dict[str, Any]:
    report: dict[str, Any] = atomic.read_json(arm.layout.final_report)
    return report


def find_events(arm: Arm, kind: str, stage: str = "distil") -> list[dict[str, Any]]:
    """An arm's events of one kind and stage."""
    return [event for event in read_events(arm.layout.events) if event["kind"] == kind and event.get("stage") == stage]


def find_validations(arm: Arm) -> list[dict[str, Any]]:
    """The student's validations that have a quality score."""
    return [event for event in find_events(arm, "validation") if event["quality_score"] is not None]


def best_validation_quality(arm: Arm) -> float:
    """Highest quality score on validation of the deployed student: that of the best checkpoint."""
    return max(float(event["quality_score"]) for event in find_validations(arm))


def stage_seconds(arm: Arm, stage: str = "distil") -> float:
    """Time spent in a stage, over all sessions of a run that was killed and resumed."""
    total, start, last = 0.0, None, 0.0
    for event in read_events(arm.layout.events):
        now = datetime.fromisoformat(event["time"]).timestamp()
        if start is not None and event["kind"] in ("run_started", "stage_finished"):
            total += (last if event["kind"] == "run_started" else now) - start
            start = None
        elif event["kind"] == "stage_started" and event["stage"] == stage:
            start = now
        last = now
    return total


def summarise(arm: Arm) -> dict[str, Any]:
    """The figures of a finished arm; scores are the deployed student's on the test set, unless named otherwise."""
    report = read_report(arm)
    deployed = report["test"][report["deployed"]]
    return {
        "bleu": deployed["scores"]["bleu"]["value"],
        "chrf": deployed["scores"]["chrf"]["value"],
        "quality_score": deployed["retentions"]["quality_score"]["value"],
        "bleu_retention": deployed["retentions"].get("bleu", {}).get("value"),
        "best_validation_quality": best_validation_quality(arm),
        "best_step": report["best_step"],
        "executed_steps": report["executed_steps"],
        "num_rollbacks": len(report["rollbacks"]),
        "halted": report["halted"],
        "gate_passed": report["gate"]["passed"],
        "seconds": stage_seconds(arm),
    }


def describe_setting(arm: Arm) -> dict[str, Any]:
    """Teacher, corpus and machine of a finished arm."""
    report, environment = read_report(arm), atomic.read_json(arm.layout.environment)
    return {
        "teacher": {name: report["test"]["teacher"]["scores"][name]["value"] for name in COMPARED}
        | {key: report["models"]["teacher"][key] for key in ("num_parameters", "num_bytes")},
        "student": {key: report["models"][report["deployed"]][key] for key in ("num_parameters", "num_bytes")},
        "corpus": report["corpus"],
        "machine": {key: environment[key] for key in ("processor", "num_cores", "python", "packages")},
    }


# ------------------------------------------------------------------------------------------------- paired comparisons


def build_compared_metrics(arm: Arm) -> list[Metric]:
    return build_metrics(COMPARED, MetricOptions(target_language=arm.load_config().corpus.target_language))


def load_statistics(arm: Arm, metrics: Sequence[Metric]) -> dict[str, FloatArray]:
    """Per-sentence statistics (N, K) of the deployed student's hypotheses of the test set."""
    deployed = read_report(arm)["deployed"]
    measured = atomic.read_json(arm.layout.stages / f"measured_{deployed}.json")
    pairs = load_split(arm.layout.corpus, "test")
    sources, references = [pair.source for pair in pairs], [pair.target for pair in pairs]
    return {metric.name: metric.statistics(measured["hypotheses"]["test"], references, sources) for metric in metrics}


def compare_arms(arms_a: Sequence[Arm], arms_b: Sequence[Arm]) -> dict[str, PairedComparison]:
    """B minus A by metric on the test set they share; several arms a side: statistics summed over them."""
    hashes = {atomic.sha256_file(arm.layout.corpus / "test.tsv") for arm in (*arms_a, *arms_b)}
    if len(hashes) > 1:
        raise BenchmarkError(
            "the arms have different test sets and cannot be compared: give another --work, so that all run anew"
        )
    metrics = build_compared_metrics(arms_a[0])
    sides = [[load_statistics(arm, metrics) for arm in side] for side in (arms_a, arms_b)]
    counts = resampling_counts(len(load_split(arms_a[0].layout.corpus, "test")), NUM_DRAWS, DRAWS_SEED)
    compared = {}
    for metric in metrics:
        summed_a, summed_b = (np.sum([statistics[metric.name] for statistics in side], axis=0) for side in sides)
        compared[metric.name] = paired_bootstrap(metric, summed_a, summed_b, counts)
    return compared


def plain_comparisons(comparisons: Mapping[str, PairedComparison]) -> dict[str, Any]:
    """As JSON-compatible data."""
    return {
        name: {
            "difference": item.difference,
            "low": item.interval[0],
            "high": item.interval[1],
            "p_value": item.p_value,
        }
        for name, item in comparisons.items()
    }


def describe_comparison(figures: Mapping[str, float]) -> str:
    """+0.8 [+0.3, +1.2], p = 0.004"""
    p_value = f"p = {figures['p_value']:.4f}" if figures["p_value"] >= 0.001 else "p < 0.001"
    return f"{figures['difference']:+.2f} [{figures['low']:+.2f}, {figures['high']:+.2f}], {p_value}"


# ----------------------------------------------------------------------------------------------------- words and files


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table with its columns aligned, so that it also reads well in a terminal."""
    lines = [[str(cell).replace("|", "\\|") for cell in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in itertools.zip_longest(*lines, fillvalue="")]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    )


def describe_config(data: Mapping[str, Any]) -> str:
    """The config of a benchmark's results, with what was set over it."""
    settings = [setting for setting in data["settings"] if not setting.startswith("teacher.cache_dir=")]
    return str(data["config"]) + (f" with {', '.join(settings)}" if settings else "")


def describe_checks(failures: Mapping[str, Sequence[str]]) -> list[str]:
    """A Markdown list: what each check demands, and what it found wrong, if anything."""
    return [
        f"- FAILED: {check} ({len(found)}: {', '.join(found[:5])})" if found else f"- holds: {check}"
        for check, found in failures.items()
    ]


def write_results(directory: Path, name: str, data: dict[str, Any], markdown: str) -> None:
    """NAME.json and NAME.md, each whole or not at all; the repository's own results go into its document as well."""
    atomic.write_json(directory / f"{name}.json", data)
    atomic.write_text(directory / f"{name}.md", markdown + "\n")
    if directory.resolve() == RESULTS:
        replace_section(DOCUMENT, name, markdown)


def replace_section(document: Path, name: str, markdown: str) -> bool:
    """Put a result between the document's lines `<!-- NAME -->` and `<!-- /NAME -->`, its headings one level down.

    False, and nothing is written, where the document has no such lines.
    """
    text = document.read_text(encoding="utf-8") if document.exists() else ""
    begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->\n"
    before, found, rest = text.partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        return False
    body = re.sub(r"^#", "##", markdown, flags=re.MULTILINE)
    atomic.write_text(document, f"{before}{begin}\n{body}\n\n{end}{after}")
    return True


def conclude(directory: Path, name: str, data: dict[str, Any], markdown: str) -> int:
    """Write and print the results of a program with checks (`data["failures"]`); returns its exit code."""
    write_results(directory, name, data, markdown)
    print(markdown)
    return 1 if any(data["failures"].values()) else 0
