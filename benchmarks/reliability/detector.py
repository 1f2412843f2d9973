"""How often does the degradation detector cry wolf, and how surely does it see a drop? Simulated on recorded noise.

Each synthetic run has a validation set of its own, drawn with replacement from the sentences of a recorded real run. A
synthetic checkpoint takes each sentence's statistics, as the validator stored them, from one of that run's last
checkpoints, with shares drawn anew for each checkpoint (Dirichlet, all ones). So single sentences jitter as they did
between real checkpoints, and the true quality wanders over the range of the last recorded ones. A true drop by d takes
a share of the sentences from the first recorded checkpoint instead: the share at which quality on all recorded
sentences is (1 - d) times that of the best checkpoint's own shares.

- healthy: 10 such validations; is any of them degraded? One alarm makes the run a false alarm.
- power: a drop follows on 5 healthy validations; is that very validation degraded?
- decline: the true quality falls by so much at each of 10 validations; when is one of them degraded?

The rules are the product's, applied to whole runs at once; `QualityDegradationDetector.judge` itself is asked about
some of the runs and must give the same verdicts. Allowance and limit of the sum over slow declines are chosen from a
grid: of the pairs that add no more than 0.1 % of false alarms, and with which no single certain drop within the margin
can be an alarm (allowance + limit is at least the margin), the one that finds declines soonest.

    python -m benchmarks.reliability.detector --run RUN_DIR [--run RUN_DIR ...]

RUN_DIR is only read. Finished parts are kept in --work. The program ends with 1 if a check fails.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import math
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import common, evidence
from benchmarks.common import BenchmarkError
from benchmarks.reliability.detector_simulation import (
    DROPS,
    NUM_VALIDATIONS,
    SLOPES,
    BoolArray,
    Judged,
    Recording,
    Simulated,
    Simulator,
    check_against_detector,
    find_alarms,
    load_recording,
    simulate_runs,
)
from cvm_translator.config.schema import GuardConfig
from cvm_translator.observe.plot_style import (
    BAD,
    FLOAT,
    MARK,
    MUTED,
    STUDENT,
    add_legend,
    build_figure,
    styled,
    to_png,
)
from cvm_translator.runs import atomic

NAME = "detector"
IMAGE = common.REPOSITORY / "docs" / "images" / "detector_power.png"
STATED_DROP = 0.10
MAX_FALSE_ALARMS = 0.01
MIN_POWER = 0.99
ALLOWANCES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)
LIMITS = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.25, 1.5)
MAX_ADDED_FALSE_ALARMS = 0.001
NUM_CHECKED = 10
"""Runs of each recording that the detector itself is asked about."""


# ------------------------------------------------------------------------------------------------------------- the runs


def run_parts(options: Namespace, recordings: Sequence[Recording], guard: GuardConfig) -> dict[int, Simulated]:
    """All runs by number of sentences; each part that was simulated before is read from its file."""
    simulated = {}
    num_parts = len(recordings)
    sizes = [len(part) for part in np.array_split(np.arange(options.num_runs), num_parts)]
    for num_sentences in options.num_sentences:
        parts = []
        for index, (recording, size) in enumerate(zip(recordings, sizes, strict=True)):
            num_declines = min(size, math.ceil(options.num_declines / num_parts))
            key = {
                "recording": recording.name,
                "steps": recording.steps,
                "num_sentences": num_sentences,
                "num_runs": size,
                "num_declines": num_declines,
                "seed": options.seed,
                "num_resamples": guard.num_resamples,
                "confidence": guard.confidence,
                "drops": DROPS,
                "slopes": SLOPES,
                "sha256": atomic.sha256_json([recording.checkpoints.sum(axis=1).tolist()]),
            }
            path = options.work / f"{recording.name}_{num_sentences}_{atomic.sha256_json(key)[:12]}.npz"
            if not path.exists():
                simulator = Simulator(recording, num_sentences, guard)
                seed = [options.seed, num_sentences, index]
                stream = io.BytesIO()
                np.savez_compressed(stream, **simulate_runs(simulator, seed, size, num_declines))  # type: ignore[arg-type]
                atomic.write_bytes(path, stream.getvalue())
                print(f"{recording.name}: {size} runs with {num_sentences} sentences", flush=True)
            with np.load(path) as arrays:
                parts.append({name: arrays[name] for name in arrays.files})
        merged = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

        def judged(name: str, arrays: Mapping[str, Any] = merged) -> Judged:
            return Judged(*(arrays[f"{name}.{key}"] for key in ("is_best", "drop", "lower")))

        simulated[num_sentences] = Simulated(
            judged("healthy"), judged("power"), {slope: judged(f"decline_{slope}") for slope in SLOPES}
        )
    return simulated


# -------------------------------------------------------------------------------------------------------------- figures


def binomial_cdf(successes: int, trials: int, probability: float) -> float:
    if probability in (0.0, 1.0):
        return 1.0 if probability == 0.0 or successes == trials else 0.0
    logs = [
        math.lgamma(trials + 1) - math.lgamma(k + 1) - math.lgamma(trials - k + 1)
        + k * math.log(probability) + (trials - k) * math.log1p(-probability)
        for k in range(successes + 1)
    ]  # fmt: skip
    return math.fsum(math.exp(value) for value in logs)


def upper_bound(successes: int, trials: int, confidence: float = 0.95) -> float:
    """Clopper and Pearson's one-sided upper bound of a share: the largest that is not refuted."""
    if successes == trials:
        return 1.0
    low, high = successes / trials, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if binomial_cdf(successes, trials, middle) > 1 - confidence else (low, middle)
    return high


def lower_bound(successes: int, trials: int, confidence: float = 0.95) -> float:
    return 1.0 - upper_bound(trials - successes, trials, confidence)


def describe_alarms(alarms: BoolArray) -> dict[str, float]:
    """Share of runs with an alarm, and its 95 % upper bound."""
    count = int(alarms.any(axis=-1).sum())
    return {"num_runs": len(alarms), "num_alarms": count, "upper_bound": upper_bound(count, len(alarms))}


def describe_decline(judged: Judged, guard: GuardConfig) -> dict[str, float]:
    """Runs with an alarm, and the mean number of the validation that raised it, 11 where none did."""
    alarms = find_alarms(judged, guard)
    first = np.where(alarms.any(axis=-1), alarms.argmax(axis=-1), NUM_VALIDATIONS)
    return {"share_found": float(alarms.any(axis=-1).mean()), "mean_validation": float(first.mean() + 1)}


def sweep_drift(simulated: Simulated, guard: GuardConfig) -> list[dict[str, float]]:
    """False alarms and delay of each allowance and limit, on the same runs."""
    rows = []
    for allowance, limit in itertools.product(ALLOWANCES, LIMITS):
        chosen = guard.model_copy(update={"drift_allowance": allowance, "drift_limit": limit})
        alarms = np.asarray(find_alarms(simulated.healthy, chosen).any(axis=-1))
        single = find_alarms(simulated.healthy, guard.model_copy(update={"drift_limit": None})).any(axis=-1)
        rows.append(
            {
                "allowance": allowance,
                "limit": limit,
                "num_added_alarms": int((alarms & ~single).sum()),
                "num_runs": len(alarms),
                **{
                    f"mean_validation_{slope}": describe_decline(judged, chosen)["mean_validation"]
                    for slope, judged in simulated.declines.items()
                },
            }
        )
    return rows


def choose_drift(rows: Sequence[Mapping[str, float]]) -> Mapping[str, float]:
    """Of the pairs that may be chosen, the one that finds declines soonest, averaged over the slopes."""
    honest = [row for row in rows if row["allowance"] + row["limit"] >= 1.0]
    quiet = [row for row in honest if row["num_added_alarms"] <= MAX_ADDED_FALSE_ALARMS * row["num_runs"]]
    return min(quiet or honest, key=lambda row: sum(row[f"mean_validation_{slope}"] for slope in SLOPES))


def describe_power(simulated: Simulated, guard: GuardConfig) -> list[dict[str, float]]:
    """Power at each drop: the single validation's own test, without any help by earlier ones."""
    found = ~simulated.power.is_best & (simulated.power.lower > guard.degradation_threshold)
    return [
        {
            "drop": drop,
            "power": float(column.mean()),
            "low": lower_bound(int(column.sum()), len(column)),
            "high": upper_bound(int(column.sum()), len(column)),
        }
        for drop, column in zip(DROPS, found.T, strict=True)
    ]


def collect_results(
    options: Namespace, recordings: Sequence[Recording], guard: GuardConfig, simulated: Mapping[int, Simulated]
) -> dict[str, Any]:
    without = guard.model_copy(update={"drift_limit": None})
    stated = options.num_sentences[0]
    by_size: dict[str, Any] = {}
    for size, runs in simulated.items():
        by_size[str(size)] = {
            "false_alarms": describe_alarms(find_alarms(runs.healthy, guard)),
            "false_alarms_single": describe_alarms(find_alarms(runs.healthy, without)),
            "any_drop": describe_alarms(runs.healthy.drop > 0),
            "significant_drop": describe_alarms(runs.healthy.lower > 0),
            "power": describe_power(runs, guard),
            "declines": {
                str(slope): {
                    "num_runs": len(judged.lower),
                    "single": describe_decline(judged, without),
                    "with_drift": describe_decline(judged, guard),
                }
                for slope, judged in runs.declines.items()
            },
        }
    sweep = sweep_drift(simulated[stated], guard)
    different: list[str] = []
    for index, recording in enumerate(recordings):
        simulator = Simulator(recording, stated, guard)
        different += check_against_detector(simulator, [options.seed, index], options.num_checked)
    data: dict[str, Any] = {
        "recordings": [
            {
                "name": recording.name,
                "steps": recording.steps,
                "num_sentences": len(recording.teacher),
                "metrics": list(recording.metrics),
                "quality": Simulator(recording, 1, guard).true_quality(np.eye(len(recording.steps))).tolist(),
            }
            for recording in recordings
        ],
        "num_runs": options.num_runs,
        "num_sentences": stated,
        "seed": options.seed,
        "guard": {
            key: getattr(guard, key)
            for key in ("degradation_threshold", "confidence", "num_resamples", "drift_allowance", "drift_limit")
        },
        "num_checked": options.num_checked * len(recordings),
        "different": different,
        "by_num_sentences": by_size,
        "drift_sweep": sweep,
        "drift_choice": dict(choose_drift(sweep)),
    }
    data["failures"] = find_failures(data)
    return data


def find_failures(data: Mapping[str, Any]) -> dict[str, list[str]]:
    """What each check found wrong, at the stated number of sentences; a check that holds has an empty list."""
    figures = data["by_num_sentences"][str(data["num_sentences"])]
    alarms = figures["false_alarms"]
    stated = next(row for row in figures["power"] if row["drop"] == STATED_DROP)
    slow = [
        f"{float(slope):.1%} a validation"
        for slope, row in figures["declines"].items()
        if row["with_drift"]["mean_validation"] > row["single"]["mean_validation"]
    ]
    return {
        f"false alarms: the 95 % upper bound is at most {MAX_FALSE_ALARMS:.0%} of healthy runs": (
            [f"{alarms['upper_bound']:.2%}"] if alarms["upper_bound"] > MAX_FALSE_ALARMS else []
        ),
        f"a drop of {STATED_DROP:.0%} is found at once in at least {MIN_POWER:.0%} of runs": (
            [f"{stated['power']:.2%}"] if stated["power"] < MIN_POWER else []
        ),
        "a slow decline is found no later than by single validations": slow,
        "the detector itself gives the same verdicts": list(data["different"]),
    }


# ---------------------------------------------------------------------------------------------------------------- words


def describe_share(figures: Mapping[str, float]) -> str:
    share = figures["num_alarms"] / figures["num_runs"]
    return f"{share:.2%} ({figures['num_alarms']:,} of {figures['num_runs']:,})"


def format_results(data: Mapping[str, Any]) -> str:
    """The checks and the tables as Markdown."""
    sections = [
        "# The degradation detector, judged by simulation",
        "\n".join(evidence.describe_checks(data["failures"])),
        f"{data['num_runs']:,} healthy runs of {NUM_VALIDATIONS} validations for each size of the validation set. Their"
        " noise is resampled from the validations of these real runs:",
        _format_recordings(data["recordings"]),
        "Healthy runs with an alarm, beside what two simpler rules would have said of the same runs:",
        _format_false_alarms(data["by_num_sentences"]),
        "Power: how often a true drop is found at the first validation after it, in brackets the 95 % lower bound. The"
        f" margin is {data['guard']['degradation_threshold']:.0%}; at a drop equal to it the test is undecided by"
        " construction.",
        _format_power(data["by_num_sentences"]),
        f"Slow declines: runs found within {NUM_VALIDATIONS} validations, and the mean number of the validation that"
        f" found it ({NUM_VALIDATIONS + 1} where none did).",
        _format_declines(data["by_num_sentences"]),
        _describe_choice(data),
        _format_sweep(data["drift_sweep"]),
        f"The detector itself judged {data['num_checked']} more runs: {len(data['different'])} verdicts differ.",
    ]
    return "\n\n".join(sections)


def _format_recordings(recordings: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        [
            recording["name"],
            f"{recording['num_sentences']:,}",
            ", ".join(recording["metrics"]),
            f"{recording['steps'][0]:,} to {recording['steps'][-2]:,}",
            f"{min(recording['quality'][:-1]):.3f} to {max(recording['quality'][:-1]):.3f}",
            f"{recording['quality'][-1]:.3f} (step {recording['steps'][-1]:,})",
        ]
        for recording in recordings
    ]
    header = ["run", "sentences", "metrics in Q", "healthy: steps", "their Q", "drops made of Q"]
    return evidence.markdown_table(header, rows)


def _format_false_alarms(by_size: Mapping[str, Any]) -> str:
    rows = [
        [
            f"{int(size):,}",
            describe_share(figures["false_alarms"]),
            f"{figures['false_alarms']['upper_bound']:.2%}",
            describe_share(figures["false_alarms_single"]),
            describe_share(figures["any_drop"]),
            describe_share(figures["significant_drop"]),
        ]
        for size, figures in by_size.items()
    ]
    header = ["sentences", "detector", "95 % upper bound", "without the sum", "any drop", "p < 0.05"]
    return evidence.markdown_table(header, rows)


def _format_power(by_size: Mapping[str, Any]) -> str:
    powers = [figures["power"] for figures in by_size.values()]
    rows = [
        [f"{column[0]['drop']:.0%}", *(f"{row['power']:.1%} ({row['low']:.1%})" for row in column)]
        for column in zip(*powers, strict=True)
    ]
    return evidence.markdown_table(["true drop", *(f"{int(size):,} sentences" for size in by_size)], rows)


def _format_declines(by_size: Mapping[str, Any]) -> str:
    rows = [
        [
            f"{int(size):,}",
            f"{float(slope):.1%}",
            row["num_runs"],
            *(f"{row[key]['share_found']:.1%}, {row[key]['mean_validation']:.1f}" for key in ("single", "with_drift")),
        ]
        for size, figures in by_size.items()
        for slope, row in figures["declines"].items()
    ]
    header = ["sentences", "decline a validation", "runs", "single validations", "with the sum"]
    return evidence.markdown_table(header, rows)


def _describe_choice(data: Mapping[str, Any]) -> str:
    guard, choice = data["guard"], data["drift_choice"]
    return (
        f"Allowance and limit of the sum, as shares of the margin, at {data['num_sentences']:,} sentences: false alarms"
        " added, and the mean number of the validation that found a decline. The product has"
        f" {guard['drift_allowance']:g} and {guard['drift_limit']:g}. Of the pairs that add at most"
        f" {MAX_ADDED_FALSE_ALARMS:.1%} of false alarms, and whose allowance and limit together are no less than the"
        f" margin, {choice['allowance']:g} and {choice['limit']:g} find declines soonest."
    )


def _format_sweep(sweep: Sequence[Mapping[str, float]]) -> str:
    rows = [
        [
            f"{row['allowance']:g}",
            f"{row['limit']:g}",
            int(row["num_added_alarms"]),
            *(f"{row[f'mean_validation_{slope}']:.2f}" for slope in SLOPES),
        ]
        for row in sweep
    ]
    return evidence.markdown_table(["allowance", "limit", "alarms", *(f"{slope:.1%}" for slope in SLOPES)], rows)


@styled
def plot_power(data: Mapping[str, Any]) -> bytes | None:
    """Power curves by size of the set, and how soon slow declines are found with the sum and without."""
    from matplotlib.ticker import PercentFormatter

    figure, (power, decline) = build_figure(1, 2, 9.6, 3.6)
    margin = data["guard"]["degradation_threshold"]
    handles, labels = [], []
    for colour, (size, figures) in zip((STUDENT, FLOAT, MARK, BAD), data["by_num_sentences"].items(), strict=False):
        rows = figures["power"]
        drops = [row["drop"] for row in rows]
        power.fill_between(drops, [row["low"] for row in rows], [row["high"] for row in rows], color=colour, alpha=0.15)
        (line,) = power.plot(drops, [row["power"] for row in rows], color=colour, marker="o", markersize=3.5)
        handles.append(line)
        labels.append(f"{int(size):,} sentences")
        slopes = [float(slope) for slope in figures["declines"]]
        for key, style in (("single", (0, (4, 2))), ("with_drift", "-")):
            delays = [row[key]["mean_validation"] for row in figures["declines"].values()]
            decline.plot(slopes, delays, color=colour, linestyle=style, marker="o", markersize=3.5)
    power.axvline(margin, color=MUTED, linewidth=1.0, linestyle=(0, (2, 2)))
    power.annotate("margin", (margin, 0.5), xytext=(-4, 0), textcoords="offset points", ha="right", color=MUTED)
    power.axhline(MIN_POWER, color=MUTED, linewidth=1.0, linestyle=(0, (2, 2)))
    power.annotate("99 %", (DROPS[0], MIN_POWER), xytext=(0, -10), textcoords="offset points", color=MUTED)
    power.set_ylim(-0.02, 1.04)
    power.set_title("A sudden drop is found at once")
    power.set_xlabel("true drop of quality")
    power.set_ylabel("share of runs")
    power.yaxis.set_major_formatter(PercentFormatter(1.0))
    power.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    decline.set_title("A slow decline (dashed: single validations only)")
    decline.set_xlabel("true decline a validation")
    decline.set_ylabel("found at validation (mean)")
    decline.set_ylim(0, NUM_VALIDATIONS + 1.5)
    decline.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=1))
    add_legend(figure, handles, labels)
    return to_png(figure)


# -------------------------------------------------------------------------------------------------------------- program


def run_benchmark(options: Namespace) -> dict[str, Any]:
    options.work.mkdir(parents=True, exist_ok=True)
    recordings = [load_recording(run.resolve(), options.last) for run in options.run]
    if len({recording.name for recording in recordings}) < len(recordings):
        raise BenchmarkError("two of the runs have the same folder name: their parts would be mixed up")
    guard = recordings[0].config.guard
    simulated = run_parts(options, recordings, guard)
    return collect_results(options, recordings, guard, simulated)


def build_parser() -> argparse.ArgumentParser:
    parser = common.build_plain_parser("Judge the degradation detector by simulation.")
    parser.add_argument("--run", type=Path, action="append", required=True, metavar="RUN_DIR", help="recorded real run")
    parser.add_argument(
        "--last", type=int, default=5, metavar="K", help="last checkpoints that a healthy one is mixed of"
    )
    parser.add_argument("--num-runs", type=int, default=2000, help="for each size of the set")
    parser.add_argument(
        "--num-declines", type=int, default=500, help="runs that are simulated declining, of each slope"
    )
    parser.add_argument("--num-sentences", type=int, nargs="+", default=[2000], help="the first is the stated one")
    parser.add_argument(
        "--num-checked", type=int, default=NUM_CHECKED, help="runs the detector itself judges, a recording"
    )
    parser.add_argument("--seed", type=int, default=13)
    parser.add_argument("--work", type=Path, default=common.RESULTS / "work" / NAME, help="finished parts")
    parser.add_argument("--image", type=Path, default=IMAGE)
    return parser


def main() -> int:
    options = build_parser().parse_args()
    data = json.loads(json.dumps(run_benchmark(options)))
    image = plot_power(data)
    assert image is not None
    atomic.write_bytes(options.image, image)
    return evidence.conclude(options.results, NAME, data, format_results(data))


if __name__ == "__main__":
    common.run_main(main)
