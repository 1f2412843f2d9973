"""A reduced model beside the one it was made from: both loaded from their files in fresh processes, compared in pairs.

Guarantees: the two translate the same sentences with the same settings, each as it is deployed; every difference comes
with a 95 % interval and a two-sided p-value from one paired bootstrap with a fixed seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cvm_translator.corpus.records import Pair
from cvm_translator.errors import ModelError
from cvm_translator.metrics import MetricOptions, build_metrics
from cvm_translator.metrics.resampling import PairedComparison, paired_bootstrap, resampling_counts
from cvm_translator.pipeline.measure import measure_sentences

COMPARED = ("bleu", "chrf", "ter")
NUM_DRAWS = 2000
DRAWS_SEED = 13


@dataclass(frozen=True)
class FolderComparison:
    """What two folders are and how they differ."""

    num_sentences: int
    original: dict[str, Any]
    """What `measure` found of the original: num_bytes, tokens_per_second, peak_memory_mib, …"""
    reduced: dict[str, Any]
    differences: dict[str, PairedComparison]
    """Reduced minus original, by metric."""


def compare_folders(original: Path, reduced: Path, pairs: Sequence[Pair], target_language: str) -> FolderComparison:
    """Translate the sources with both model folders, one process each, and compare with the references."""
    sources, references = [pair.source for pair in pairs], [pair.target for pair in pairs]
    before, after = (measure_sentences(folder, sources) for folder in (original, reduced))
    differences = compare_texts(before["hypotheses"], after["hypotheses"], sources, references, target_language)
    return FolderComparison(len(pairs), before, after, differences)


def compare_texts(
    before: Sequence[str],
    after: Sequence[str],
    sources: Sequence[str],
    references: Sequence[str],
    target_language: str,
    metrics: Sequence[str] = COMPARED,
) -> dict[str, PairedComparison]:
    """After minus before, by metric, on the same sentences and under the same draws."""
    counts = resampling_counts(len(references), NUM_DRAWS, DRAWS_SEED)
    return {
        metric.name: paired_bootstrap(
            metric,
            metric.statistics(before, references, sources),
            metric.statistics(after, references, sources),
            counts,
        )
        for metric in build_metrics(metrics, MetricOptions(target_language=target_language))
    }


def format_comparison(comparison: FolderComparison) -> str:
    """The comparison as a few lines for the terminal."""
    original, reduced = comparison.original, comparison.reduced
    lines = [f"{'':<18}{original['number_format']:>14}{reduced['number_format']:>14}   change"]
    for name, item in comparison.differences.items():
        low, high = item.interval
        lines.append(
            f"{_TITLES[name]:<18}{item.score_a:>14.2f}{item.score_b:>14.2f}"
            f"   {item.difference:+.2f} ({low:+.2f} to {high:+.2f}), p = {item.p_value:.3f}"
        )
    for title, key, scale, form in _FIGURES:
        first, second = original[key] / scale, reduced[key] / scale
        lines.append(f"{title:<18}{first:>14{form}}{second:>14{form}}   {second / first:.2f} times")
    lines.append(f"on {comparison.num_sentences:,} sentences, each model in a process of its own; 95 % intervals")
    return "\n".join(lines)


_TITLES = {"bleu": "BLEU", "chrf": "chrF", "ter": "TER (lower: better)"}
_FIGURES = (
    ("weights, MiB", "num_bytes", 2**20, ".2f"),
    ("tokens a second", "tokens_per_second", 1, ",.0f"),
    ("peak memory, MiB", "peak_memory_mib", 1, ",.0f"),
)


def refuse_loss(bleu: PairedComparison, max_drop: float, remedy: str) -> None:
    """Raise ModelError when BLEU falls by more than `max_drop` points: the difference itself, whatever its interval."""
    if -bleu.difference > max_drop:
        low, high = bleu.interval
        raise ModelError(
            f"BLEU falls by {-bleu.difference:.2f} from {bleu.score_a:.2f} (95 % interval {-high:.2f} to {-low:.2f}),"
            f" more than --max-drop {max_drop:g}: nothing was written; {remedy}"
        )
