"""A reduced model beside the one it was made from: both loaded from their files in fresh processes, compared in pairs.

Guarantees: the two translate the same sentences with the same settings, each as it is deployed; every difference comes
with a 95 % interval and a two-sided p-value from one paired bootstrap with a fixed seed.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cvm_translator.corpus.records import Pair
from cvm_translator.errors import ModelError
from cvm_translator.metrics import MetricOptions, build_metrics
from cvm_translator.metrics.resampling import PairedComparison, paired_bootstrap, resampling_counts
from cvm_translator.pipeline.measure import measure_folder

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

    @property
    def bleu_loss(self) -> float:
        return -self.differences["bleu"].difference

    def to_plain(self) -> dict[str, Any]:
        """As JSON-compatible data, without the hypotheses."""
        figures = ("number_format", "num_bytes", "tokens_per_second", "peak_memory_mib", "baseline_memory_mib")
        return {
            "num_sentences": self.num_sentences,
            "original": {name: self.original[name] for name in figures},
            "reduced": {name: self.reduced[name] for name in figures},
            "differences": {
                name: {
                    "original": item.score_a,
                    "reduced": item.score_b,
                    "difference": item.difference,
                    "interval": list(item.interval),
                    "p_value": item.p_value,
                }
                for name, item in self.differences.items()
            },
        }


def compare_folders(
    original: Path,
    reduced: Path,
    pairs: Sequence[Pair],
    target_language: str,
    *,
    batch_size: int = 128,
    num_threads: int = 1,
    device: str = "cpu",
) -> FolderComparison:
    """Translate the sources with both model folders, one process each, and compare with the references."""
    with tempfile.TemporaryDirectory() as folder:
        sources = Path(folder) / "pairs.tsv"
        sources.write_text("".join(f"{pair.source}\t{pair.target}\n" for pair in pairs), encoding="utf-8")
        measured = [
            measure_folder(
                model,
                {"pairs": sources},
                Path(folder) / "measured.json",
                beam_size=1,
                batch_size=batch_size,
                device=device,
                num_threads=num_threads,
            )
            for model in (original, reduced)
        ]
    original_figures, reduced_figures = measured
    differences = compare_hypotheses(pairs, measured, target_language)
    return FolderComparison(len(pairs), original_figures, reduced_figures, differences)


def compare_hypotheses(
    pairs: Sequence[Pair], measured: Sequence[dict[str, Any]], target_language: str
) -> dict[str, PairedComparison]:
    """Second minus first of two measurements of the set `pairs`, by metric."""
    references, sources = [pair.target for pair in pairs], [pair.source for pair in pairs]
    counts = resampling_counts(len(pairs), NUM_DRAWS, DRAWS_SEED)
    compared = {}
    for metric in build_metrics(COMPARED, MetricOptions(target_language=target_language)):
        first, second = (metric.statistics(item["hypotheses"]["pairs"], references, sources) for item in measured)
        compared[metric.name] = paired_bootstrap(metric, first, second, counts)
    return compared


def format_comparison(comparison: FolderComparison) -> str:
    """The comparison as a few lines for the terminal."""
    original, reduced = comparison.original, comparison.reduced
    lines = [f"{'':<18}{original['number_format']:>12}{reduced['number_format']:>12}   change"]
    for name, item in comparison.differences.items():
        low, high = item.interval
        lines.append(
            f"{_TITLES[name]:<18}{item.score_a:>12.2f}{item.score_b:>12.2f}"
            f"   {item.difference:+.2f} ({low:+.2f} to {high:+.2f}), p = {item.p_value:.3f}"
        )
    for title, key, scale, form in _FIGURES:
        first, second = original[key] / scale, reduced[key] / scale
        lines.append(f"{title:<18}{first:>12{form}}{second:>12{form}}   {second / first:.2f} times")
    lines.append(f"on {comparison.num_sentences:,} sentences, each model in a process of its own; 95 % intervals")
    return "\n".join(lines)


_TITLES = {"bleu": "BLEU", "chrf": "chrF", "ter": "TER (lower: better)"}
_FIGURES = (
    ("weights, MiB", "num_bytes", 2**20, ".2f"),
    ("tokens a second", "tokens_per_second", 1, ",.0f"),
    ("peak memory, MiB", "peak_memory_mib", 1, ",.0f"),
)


def refuse_loss(comparison: FolderComparison, max_drop: float) -> None:
    """Raise ModelError when BLEU falls by more than `max_drop` points."""
    if comparison.bleu_loss > max_drop:
        low, high = comparison.differences["bleu"].interval
        raise ModelError(
            f"BLEU falls by {comparison.bleu_loss:.2f} (95 % interval {-high:.2f} to {-low:.2f}), more than --max-drop"
            f" {max_drop:g}: nothing was written; allow more, or choose another method"
        )
