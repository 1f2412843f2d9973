"""What does the guard cost a run that needs none? The same healthy small runs, seed by seed, with the guard on and off.

Nothing is planted. Without a rollback the guard only watches, so both runs of a seed must train the same model bit for
bit; what they deliver may differ, since the guard delivers the best checkpoint and a run without it the last. Checked:

- no guarded run rolls back, halts or skips a batch;
- every loss of the two runs of a seed is the same, bit for bit, and so are the weights of the last checkpoint;
- over all seeds, what the guarded runs deliver is not significantly worse on the test set (paired bootstrap).

    python -m benchmarks.reliability.healthy_guard

All runs share one cached teacher. The program can be killed and started again; it ends with 1 if a check fails.
"""

from __future__ import annotations

import argparse
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks import common, evidence
from benchmarks.common import Arm
from benchmarks.reliability import tiny_run
from benchmarks.reliability.injected_faults import GUARD
from benchmarks.reliability.kill_resume import read_losses
from cvm_translator.runs import atomic
from cvm_translator.runs.events import read_events

NAME = "healthy_guard"

CALM = "no guarded run rolls back, halts or skips a batch"
SAME = "both runs of a seed have the same losses and end with the same weights, bit for bit"
NO_WORSE = "what the guarded runs deliver is not significantly worse"


def build_arms(options: Namespace, config: Path) -> dict[int, dict[str, Arm]]:
    """By seed and guard (on or off)."""
    work = options.work.resolve()
    shared = (f"teacher.cache_dir={work / 'teachers'}", *options.set)
    return {
        seed: {
            guard: tiny_run.build_arm(work, f"seed_{seed}_{guard}", config, *shared, f"seed={seed}", *settings)
            for guard, settings in GUARD.items()
        }
        for seed in range(options.first_seed, options.first_seed + options.seeds)
    }


def hash_last_weights(arm: Arm) -> str:
    return atomic.sha256_file(arm.layout.checkpoints / "latest" / "model.safetensors")


def read_student_losses(arm: Arm) -> dict[tuple[str, int, int, int], list[Any]]:
    """The teacher's are those of the one run that trained it."""
    return {key: losses for key, losses in read_losses(arm).items() if key[0] == "distil"}


def find_failures(arms: Mapping[int, Mapping[str, Arm]], compared: Mapping[str, Any]) -> dict[str, list[str]]:
    """What each check found wrong; a check that holds has an empty list."""
    failures: dict[str, list[str]] = {CALM: [], SAME: [], NO_WORSE: []}
    for seed, pair in arms.items():
        report = evidence.read_report(pair["on"])
        skipped = [event for event in read_events(pair["on"].layout.events) if event.get("code") == "batch_skipped"]
        if report["rollbacks"] or report["halted"] or skipped:
            failures[CALM].append(f"seed {seed}: {len(report['rollbacks'])} rollbacks, {len(skipped)} batches skipped")
        if read_student_losses(pair["on"]) != read_student_losses(pair["off"]):
            failures[SAME].append(f"seed {seed}: losses")
        if hash_last_weights(pair["on"]) != hash_last_weights(pair["off"]):
            failures[SAME].append(f"seed {seed}: weights")
    failures[NO_WORSE] += [
        f"{metric}: {evidence.describe_comparison(figures)}"
        for metric, figures in compared.items()
        if figures["difference"] < 0 and figures["p_value"] < evidence.SIGNIFICANCE
    ]
    return failures


def run_benchmark(options: Namespace) -> dict[str, Any]:
    config = tiny_run.write_config(options.work.resolve())
    arms = build_arms(options, config)
    common.run_arms([arm for pair in arms.values() for arm in pair.values()], 1, 1)
    on, off = ([pair[guard] for pair in arms.values()] for guard in ("on", "off"))
    compared = evidence.plain_comparisons(evidence.compare_arms(off, on))
    return {
        "settings": list(options.set),
        "runs": {seed: {guard: evidence.summarise(arm) for guard, arm in pair.items()} for seed, pair in arms.items()},
        "num_steps": len(read_student_losses(on[0])),
        "on_minus_off": compared,
        "failures": find_failures(arms, compared),
    }


def format_results(data: Mapping[str, Any]) -> str:
    """The checks and the table as Markdown."""
    lines = [
        "# The guard in healthy runs",
        "",
        *evidence.describe_checks(data["failures"]),
        "",
        f"{len(data['runs'])} seeds of {data['num_steps']} steps each; scores are those of the delivered int8 students"
        " on the test set:",
        "",
    ]
    rows = [
        [
            seed,
            f"{pair['on']['best_step']}",
            *(f"{pair[guard]['bleu']:.2f} / {pair[guard]['chrf']:.2f}" for guard in ("on", "off")),
        ]
        for seed, pair in data["runs"].items()
    ]
    header = ["seed", "step delivered with the guard", "guard on, BLEU / chrF", "guard off (last step)"]
    lines += [evidence.markdown_table(header, rows), "", "Guard on minus guard off, with 95 % interval:", ""]
    rows = [[metric, evidence.describe_comparison(figures)] for metric, figures in data["on_minus_off"].items()]
    return "\n".join([*lines, evidence.markdown_table(["metric", "difference"], rows)])


def build_parser() -> argparse.ArgumentParser:
    parser = common.build_plain_parser("Train healthy seeds with the guard on and off.")
    parser.add_argument("--seeds", type=int, default=5, metavar="N")
    parser.add_argument("--first-seed", type=int, default=201)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of all runs")
    parser.add_argument("--work", type=Path, default=common.RESULTS / "work" / NAME)
    return parser


def main() -> int:
    options = build_parser().parse_args()
    data = run_benchmark(options)
    return evidence.conclude(options.results, NAME, data, format_results(data))


if __name__ == "__main__":
    common.run_main(main)
