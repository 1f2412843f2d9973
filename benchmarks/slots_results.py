"""What the arms of `slots` show: comparisons, checks, tables and the plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks import evidence
from cvm_translator.corpus.records import Pair
from cvm_translator.metrics import MetricOptions, build_metrics
from cvm_translator.metrics.resampling import paired_bootstrap, resampling_counts
from cvm_translator.observe import plot_style

CONTROL, START, AFTERWARDS = "full attention", "full attention, before this training", ", put on afterwards"
LONG, JOINED = "single sentences", "joined sentences"


def name_row(capacity: int | None) -> str:
    return CONTROL if capacity is None else f"{capacity} slots"


def compare(rows: Mapping[str, dict[str, Any]], pairs: Sequence[Pair], target_language: str) -> dict[str, Any]:
    """Scores, memory and differences from the control, of all rows on one set."""
    metrics = build_metrics(evidence.COMPARED, MetricOptions(target_language=target_language))
    sources, references = [pair.source for pair in pairs], [pair.target for pair in pairs]
    counts = resampling_counts(len(pairs), evidence.NUM_DRAWS, evidence.DRAWS_SEED)
    control = [metric.statistics(rows[CONTROL]["hypotheses"], references, sources) for metric in metrics]
    found: dict[str, Any] = {}
    for name, row in rows.items():
        compared = {
            metric.name: paired_bootstrap(
                metric, full, metric.statistics(row["hypotheses"], references, sources), counts
            )
            for metric, full in zip(metrics, control, strict=True)
        }
        found[name] = {
            **{metric: item.score_b for metric, item in compared.items()},
            "against_control": {} if name == CONTROL else evidence.plain_comparisons(compared),
            **{key: row[key] for key in ("num_slots", "num_bytes")},
            "byte_ratio": row["num_bytes"] / rows[CONTROL]["num_bytes"],
        }
    return found


def find_failures(data: Mapping[str, Any]) -> dict[str, list[str]]:
    """What each check found wrong; one that holds has an empty list."""
    training, steps = data["training"], data["steps"]
    bounds = {name_row(capacity) + end: capacity for capacity in data["capacities"] for end in ("", AFTERWARDS)}
    over = [
        f"{row}, {name}: {figures['rows'][row]['num_slots']}"
        for name, figures in data["sets"].items()
        for row, capacity in bounds.items()
        if figures["rows"][row]["num_slots"] > capacity
    ]
    ratios = {row: data["sets"][JOINED]["rows"][row]["byte_ratio"] for row in bounds}
    return {
        "no decoder holds more slots than its bound": over,
        f"every arm was trained for {steps:,} steps, none skipped or repeated": [
            f"{name}: {arm['num_iterations']:,} of {arm['executed_steps']:,}"
            for name, arm in training.items()
            if (arm["num_iterations"], arm["executed_steps"]) != (steps, steps)
        ],
        "every arm saw the control's batches": [
            name for name, arm in training.items() if arm["batches"] != training[CONTROL]["batches"]
        ],
        f"{JOINED} take less memory in slots than in full attention": [
            f"{row}: {ratio:.2f}" for row, ratio in ratios.items() if ratio >= 1.0
        ],
    }


# --------------------------------------------------------------------------------------------------------------- words


def format_results(data: Mapping[str, Any]) -> str:
    """The checks and a table for each set, as Markdown."""
    lines = [
        "# Attention in a bounded number of slots",
        "",
        *evidence.describe_checks(data["failures"]),
        "",
        f"The float student of {data['run']} ({data['num_parameters']:,} parameters), trained on for"
        f" {data['steps']:,} steps of {data['batch_tokens']:,} padded tokens by cross-entropy (learning rate"
        f" {data['learning_rate']:g}), on its training pairs and on the same ones joined: with full attention, and with"
        f" each bound from the same start on the same batches. “{AFTERWARDS.strip(', ')}”: the bound on the weights"
        " that were trained with full attention. Differences are from full attention, with 95 % interval (paired"
        f" bootstrap over sentences or texts, {evidence.NUM_DRAWS:,} draws, two-sided p). Memory: the decoder's keys,"
        " values and counts, of itself and of the source, when a sentence is done; float32.",
    ]
    for name, figures in data["sets"].items():
        lines += [
            "",
            f"## Quality and memory: {figures['num_sentences']:,} {name}, {figures['mean_tokens']:.0f} source tokens on"
            " average",
            "",
            evidence.markdown_table(HEADER, [_format_row(row, found) for row, found in figures["rows"].items()]),
        ]
    return "\n".join(lines)


HEADER = ["decoder", "BLEU", "difference", "chrF", "difference", "KiB a sentence", "of full attention"]


def _format_row(name: str, found: Mapping[str, Any]) -> list[str]:
    cells = [name]
    for metric in evidence.COMPARED:
        against = found["against_control"]
        cells += [f"{found[metric]:.2f}", evidence.describe_comparison(against[metric]) if against else "-"]
    return [*cells, f"{found['num_bytes'] / 1024:.1f}", f"{found['byte_ratio']:.3f}"]


# ---------------------------------------------------------------------------------------------------------------- plot


@plot_style.styled
def plot(data: Mapping[str, Any]) -> bytes:
    """BLEU over the number of slots, a panel for each set; bars: the intervals of the difference from the control."""
    figure, panels = plot_style.build_figure(1, len(data["sets"]), 4.6 * len(data["sets"]), 3.4)
    capacities = data["capacities"]
    series = (("trained with the slots", "", plot_style.STUDENT), ("put on afterwards", AFTERWARDS, plot_style.BAD))
    for axes, (name, figures) in zip(panels, data["sets"].items(), strict=True):
        control = figures["rows"][CONTROL]["bleu"]
        axes.axhline(control, color=plot_style.FLOAT, linestyle="--")
        for _, end, colour in series:
            found = [figures["rows"][name_row(capacity) + end] for capacity in capacities]
            scores, against = [row["bleu"] for row in found], [row["against_control"]["bleu"] for row in found]
            below = [item["difference"] - item["low"] for item in against]
            above = [item["high"] - item["difference"] for item in against]
            axes.errorbar(capacities, scores, [below, above], marker="o", color=colour, capsize=3)
        axes.set_xscale("log", base=2)
        axes.set_xticks(capacities, [str(capacity) for capacity in capacities])
        axes.minorticks_off()
        axes.set_ylim(bottom=0)
        axes.set_xlabel("slots of each attention head")
        axes.set_ylabel("BLEU")
        axes.set_title(f"{figures['num_sentences']} {name}, {figures['mean_tokens']:.0f} tokens on average")
    handles = [plot_style.build_handle(plot_style.FLOAT, linestyle="--")]
    handles += [plot_style.build_handle(colour, marker="o") for _, _, colour in series]
    plot_style.add_legend(figure, handles, ["full attention", *(label for label, _, _ in series)])
    return plot_style.to_png(figure)
