"""What the measured rows of the quantisation benchmark say: comparisons, demands and table.

Guarantees: all comparisons are made under the same resampled test sets, so that also sums of several differences have
an interval; statistics are summed over the runs, sizes and memory are the largest of the runs. Demands are on the
values themselves, with the intervals beside them, but where they name the interval.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks import evidence
from benchmarks.quantization_rows import FLOAT, INT8, METHODS, QAT4, UNIFORM, UNIFORM_ZEROS, Lineup, name_grid
from cvm_translator.corpus.records import Pair
from cvm_translator.metrics import MetricOptions, build_metrics
from cvm_translator.metrics.base import FloatArray, Metric
from cvm_translator.metrics.resampling import (
    CountArray,
    confidence_interval,
    paired_p_value,
    resample,
    resampling_counts,
)

BATCH_SIZES = (1, 32, 128)
MAX_LOSS = {INT8: 0.3, QAT4: 1.0}
"""BLEU points against float32."""
MIN_ROUNDING_LOSS = 0.3
"""BLEU points that rounding must lose before a share of them is worth recovering."""
MIN_RUNS = 3
MAX_INT8_SHARE, MAX_INT4_SHARE = 0.27, 1 / 7
"""Of float32's bytes."""
INT8_ROWS = tuple(name for name, settings in METHODS.items() if settings["bits"] == 8)
INT4_ROWS = (name_grid(UNIFORM), name_grid(UNIFORM_ZEROS), QAT4)
NOT_MEASURED = "not measured: give --qat4"


# --------------------------------------------------------------------------------------------------------- comparisons


@dataclass(frozen=True)
class Scored:
    """A row by one metric."""

    score: float
    by_run: list[float]
    draws: FloatArray
    """(draws,) scores of the resampled test sets."""


def score_row(
    metric: Metric,
    hypotheses: Sequence[Sequence[str]],
    references: Sequence[str],
    sources: Sequence[str],
    counts: CountArray,
) -> Scored:
    """Score the hypotheses of each run together."""
    by_run = [metric.statistics(one, references, sources) for one in hypotheses]
    summed = np.sum(by_run, axis=0)
    return Scored(
        float(metric.score(summed.sum(axis=0))),
        [float(metric.score(one.sum(axis=0))) for one in by_run],
        metric.score(resample(counts, summed)),
    )


def contrast(scored: Mapping[str, Scored], weights: Mapping[str, float]) -> dict[str, float]:
    """A weighted sum of rows' scores, its 95 % interval and its two-sided p, under the same draws for all rows."""
    difference = float(sum(weight * scored[name].score for name, weight in weights.items()))
    draws = np.sum([weight * scored[name].draws for name, weight in weights.items()], axis=0)
    low, high = confidence_interval(draws)
    return {"difference": difference, "low": low, "high": high, "p_value": paired_p_value(difference, draws)}


def compare(
    measured: Sequence[Mapping[str, Mapping[str, Any]]], pairs: Sequence[Pair], target_language: str, lineup: Lineup
) -> dict[str, Any]:
    """`rows`, `recovery` (None without QAT4) and `equal_bytes` of what was measured of each run."""
    references, sources = [pair.target for pair in pairs], [pair.source for pair in pairs]
    counts = resampling_counts(len(pairs), evidence.NUM_DRAWS, evidence.DRAWS_SEED)
    scored: dict[str, dict[str, Scored]] = {}
    for metric in build_metrics(evidence.COMPARED, MetricOptions(target_language=target_language)):
        scored[metric.name] = {
            name: score_row(metric, [run[name]["hypotheses"]["test"] for run in measured], references, sources, counts)
            for name in measured[0]
        }
    rows = {name: _describe_row(name, scored, [run[name] for run in measured]) for name in measured[0]}
    for row in rows.values():
        row["byte_share"] = row["num_bytes"] / rows[FLOAT]["num_bytes"]
    equal_bytes = [
        {
            "mixed": mixed,
            "uniform": uniform,
            "byte_ratio": rows[mixed]["num_bytes"] / rows[uniform]["num_bytes"],
            **{metric: contrast(found, {mixed: 1.0, uniform: -1.0}) for metric, found in scored.items()},
        }
        for mixed, uniform in lineup.equal_bytes
    ]
    recovery = None if lineup.rounded is None else compute_recovery(scored["bleu"], lineup.rounded)
    return {"rows": rows, "recovery": recovery, "equal_bytes": equal_bytes}


def _describe_row(
    name: str, scored: Mapping[str, Mapping[str, Scored]], runs: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    return {
        "scores": {metric: found[name].score for metric, found in scored.items()},
        "scores_by_run": {metric: found[name].by_run for metric, found in scored.items()},
        "against_float": {}
        if name == FLOAT
        else {metric: contrast(found, {name: 1.0, FLOAT: -1.0}) for metric, found in scored.items()},
        "num_bytes": max(run["num_bytes"] for run in runs),
        "memory_mib": max(run["peak_memory_mib"] - run["baseline_memory_mib"] for run in runs),
    }


def compute_recovery(scored: Mapping[str, Scored], rounded: str) -> dict[str, Any]:
    """What training at 4 bits gains over rounding to the same grid, beside what that loses.

    `share` is what is gained over what is lost; it has no interval where rounding loses nothing in some draw.
    """
    lost, gained = contrast(scored, {FLOAT: 1.0, rounded: -1.0}), contrast(scored, {QAT4: 1.0, rounded: -1.0})
    lost_draws = scored[FLOAT].draws - scored[rounded].draws
    interval = None
    if (lost_draws > 0.0).all():
        interval = list(confidence_interval((scored[QAT4].draws - scored[rounded].draws) / lost_draws))
    by_run = zip(scored[FLOAT].by_run, scored[rounded].by_run, scored[QAT4].by_run, strict=True)
    return {
        "rounded": rounded,
        "lost": lost,
        "gained": gained,
        "beyond_half": contrast(scored, {QAT4: 1.0, rounded: -0.5, FLOAT: -0.5}),
        "share": gained["difference"] / lost["difference"] if lost["difference"] > 0.0 else None,
        "share_interval": interval,
        "by_run": [{"lost": full - low, "gained": trained - low} for full, low, trained in by_run],
    }


def find_medians(rounds: Sequence[Mapping[str, Mapping[str, float]]]) -> dict[str, dict[str, float]]:
    """Tokens a second by row and batch size; none without rounds."""
    if not rounds:
        return {}
    return {
        name: {size: statistics.median(one[name][size] for one in rounds) for size in sizes}
        for name, sizes in rounds[0].items()
    }


# ------------------------------------------------------------------------------------------------------------- demands


def find_failures(data: Mapping[str, Any]) -> dict[str, list[str]]:
    """What each demand found wrong; one that holds has an empty list."""
    rows, num_runs = data["rows"], len(data["runs"])
    found: dict[str, list[str]] = {}
    for name, most in MAX_LOSS.items():
        said = [NOT_MEASURED]
        if name in rows:
            loss = -rows[name]["against_float"]["bleu"]["difference"]
            said = [f"{loss:.2f}"] if loss > most else []
        found[f"{name}: at most {most:g} BLEU less than {FLOAT}"] = said
    found |= _check_recovery(data["recovery"])
    found[f"the BLEU figures are of at least {MIN_RUNS} runs"] = [] if num_runs >= MIN_RUNS else [f"of {num_runs}"]
    for demand, names, most in (
        (f"8 bits: at most {MAX_INT8_SHARE:g} of {FLOAT}'s bytes", INT8_ROWS, MAX_INT8_SHARE),
        (f"4 bits in groups of 64, and as trained: at most 1/7 of {FLOAT}'s bytes", INT4_ROWS, MAX_INT4_SHARE),
    ):
        shares = {name: rows[name]["byte_share"] for name in names if name in rows}
        found[demand] = [f"{name}: {share:.4f}" for name, share in shares.items() if share > most]
    return found


def _check_recovery(recovery: Mapping[str, Any] | None) -> dict[str, list[str]]:
    better = f"{QAT4}: the 95 % interval of the gain over rounding to the same grid is above 0"
    half = f"{QAT4}: at least half of what rounding to the same grid loses is recovered"
    if recovery is None:
        return {better: [NOT_MEASURED], half: [NOT_MEASURED]}
    gained, lost = recovery["gained"], recovery["lost"]["difference"]
    failures = {better: [] if gained["low"] > 0.0 else [evidence.describe_comparison(gained)], half: []}
    if lost < MIN_ROUNDING_LOSS:
        failures[half] = [f"rounding loses only {lost:.2f} BLEU: train on a coarser grid"]
    elif recovery["beyond_half"]["difference"] < 0.0:
        failures[half] = [f"{recovery['share']:.1%}"]
    return failures


# --------------------------------------------------------------------------------------------------------------- words


def format_results(data: Mapping[str, Any]) -> str:
    """The table, the demands, and what they rest on, as Markdown."""
    lines = [
        f"# Quantisation: {', '.join(data['runs'])}",
        "",
        describe_setting(data),
        "",
        _format_rows(data["rows"], data["speeds"]),
        "",
        "## Demands",
        "",
        *evidence.describe_checks(data["failures"]),
    ]
    if data["recovery"] is not None:
        lines += ["", "## Trained at 4 bits against rounded to the same grid", "", *describe_recovery(data["recovery"])]
    lines += ["", "## Mixed against uniform at equal bytes", "", _format_equal_bytes(data["equal_bytes"])]
    return "\n".join(lines)


def describe_setting(data: Mapping[str, Any]) -> str:
    machine, num_rounds = data["machine"], len(data["speed_rounds"])
    trained = f" (trained at 4 bits: {', '.join(data['runs_at_4_bits'])})" if data["runs_at_4_bits"] else ""
    timed = f"medians of {num_rounds} rounds in which the rows take turns" if num_rounds else "not timed (-)"
    return (
        f"{len(data['runs'])} runs{trained}, {data['num_sentences']:,} test sentences; differences with 95 % interval"
        f" (paired bootstrap over sentences, {evidence.NUM_DRAWS:,} draws, statistics summed over runs). Bytes: the"
        " weights without the tokenizer. Speed: generated tokens a second of the first run's students on"
        f" {data['num_threads']} of {machine['num_cores']} cores of {machine['processor']}, torch {machine['torch']},"
        f" {timed}. Peak memory: above the bare process, translating the test set in batches of 128."
    )


def _format_rows(rows: Mapping[str, Any], speeds: Mapping[str, Any]) -> str:
    cells = [
        [
            name,
            f"{row['num_bytes']:,}",
            f"{row['byte_share']:.3f}",
            f"{row['scores']['bleu']:.2f}",
            *(
                evidence.describe_comparison(row["against_float"][metric]) if row["against_float"] else "-"
                for metric in evidence.COMPARED
            ),
            *(f"{speeds[name][str(size)]:,.0f}" if speeds else "-" for size in BATCH_SIZES),
            f"{row['memory_mib']:.0f}",
        ]
        for name, row in rows.items()
    ]
    header = ["method", "bytes", "of float32", "BLEU", "BLEU against float", "chrF against float"]
    header += [f"tokens/s, batch {size}" for size in BATCH_SIZES] + ["peak memory, MiB"]
    return evidence.markdown_table(header, cells)


def describe_recovery(recovery: Mapping[str, Any]) -> list[str]:
    """A Markdown list: what rounding loses, what training gains over it, and whether that is more than half."""
    beyond, share, interval = recovery["beyond_half"], recovery["share"], recovery["share_interval"]
    between = f" [{interval[0]:.0%}, {interval[1]:.0%}]" if interval else ""
    by_run = ", ".join(f"{run['gained']:+.2f} of {run['lost']:.2f}" for run in recovery["by_run"])
    shown = (
        "more than half is shown"
        if beyond["low"] > 0.0
        else "less than half is shown"
        if beyond["high"] < 0.0
        else "the interval holds 0, so neither more nor less than half is shown"
    )
    return [
        f"- {recovery['rounded']} loses, BLEU: {evidence.describe_comparison(recovery['lost'])}",
        f"- {QAT4} gains over it, BLEU: {evidence.describe_comparison(recovery['gained'])}",
        f"- recovered: {'-' if share is None else f'{share:.0%}'}{between}; by run, BLEU: {by_run}",
        f"- the gain less half of the loss, BLEU: {evidence.describe_comparison(beyond)}: {shown}",
    ]


def _format_equal_bytes(comparisons: Sequence[Mapping[str, Any]]) -> str:
    cells = [
        [
            found["mixed"],
            found["uniform"],
            f"{found['byte_ratio']:.3f}",
            *(evidence.describe_comparison(found[metric]) for metric in evidence.COMPARED),
            describe_winner(found["bleu"]),
        ]
        for found in comparisons
    ]
    header = ["mixed", "uniform", "bytes, mixed to uniform", "BLEU, mixed minus uniform", "chrF, mixed minus uniform"]
    return evidence.markdown_table([*header, "by BLEU"], cells)


def describe_winner(figures: Mapping[str, float]) -> str:
    if figures["p_value"] >= evidence.SIGNIFICANCE:
        return "no difference shown"
    return "mixed is better" if figures["difference"] > 0.0 else "uniform is better"
