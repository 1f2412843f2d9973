"""What do the teacher's stored states save, and do they change the losses?

Ours against ours, with the sentences and sizes of `benchmarks.training`: once the teacher runs in every step, once its
last hidden states are read back. Steps per second of both, the time that storing the states took, and the largest
relative difference of any step's loss, which bfloat16 bounds.

    python -m benchmarks.teacher_cache

Systems take turns, a process each; medians of the rounds are compared.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks import common, evidence
from benchmarks.training import OURS, OURS_STORED, Parts, Problem, add_problem_options, read_problem, run_ours
from cvm_translator.config.model_presets import MODEL_PRESETS

NAME = "teacher_cache"
MIN_SPEEDUP = 1.5
MAX_LOSS_DIFFERENCE = 2.0**-8
"""Relative: half a step of bfloat16's eight bits."""


def run_worker(name: str, problem: Problem) -> dict[str, Any]:
    losses: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        figures = run_ours(Parts.build(problem), Path(folder), has_stored_states=name == OURS_STORED, losses=losses)
    return figures | {"losses": losses}


def measure(problem: Problem, num_threads: int, num_rounds: int) -> dict[str, Any]:
    names = (OURS, OURS_STORED)
    rounds = common.ask_in_turns("benchmarks.teacher_cache", names, asdict(problem), num_threads, num_rounds)
    speeds = {name: statistics.median(answers[name]["tokens_per_second"] for answers in rounds) for name in names}
    pairs = zip(*(rounds[0][name]["losses"] for name in names), strict=True)
    return {
        "tokens_per_second": speeds,
        "states_seconds": statistics.median(answers[OURS_STORED]["states_seconds"] for answers in rounds),
        "speedup": speeds[OURS_STORED] / speeds[OURS],
        "largest_loss_difference": max(abs(a - b) / abs(a) for a, b in pairs),
    }


def check(data: dict[str, Any]) -> dict[str, list[str]]:
    speedup, difference = data["speedup"], data["largest_loss_difference"]
    return {
        f"stored states make steps at least {MIN_SPEEDUP:g} times as fast": (
            [] if speedup >= MIN_SPEEDUP else [f"{speedup:.2f} times"]
        ),
        f"every step's loss is the same within {MAX_LOSS_DIFFERENCE:.4f} of it": (
            [] if difference <= MAX_LOSS_DIFFERENCE else [f"{difference:.4f}"]
        ),
    }


def format_results(data: dict[str, Any]) -> str:
    problem = data["problem"]
    rows = [
        [name, f"{rate:,.0f}", f"{rate / data['tokens_per_second'][OURS]:.2f}"]
        for name, rate in data["tokens_per_second"].items()
    ]
    return "\n".join(
        [
            "# The teacher's stored states",
            "",
            *evidence.describe_checks(data["failures"]),
            "",
            f"Student {problem['student']}, teacher {problem['teacher']}, vocabulary {problem['vocabulary']:,};"
            f" {problem['batch_size']} sentences a step, {problem['num_steps']} steps after {problem['num_warm_up']};"
            f" {data['threads']} threads, medians of {data['rounds']} rounds. Storing the states of these sentences"
            f" took {data['states_seconds']:.0f} s, once. Largest relative difference of a step's loss:"
            f" {data['largest_loss_difference']:.5f}.",
            "",
            evidence.markdown_table(["system", "target tokens/s", "times"], rows),
        ]
    )


def main() -> int:
    parser = common.build_plain_parser("Compare distillation with and without the teacher's stored states.")
    parser.add_argument("--teacher", choices=MODEL_PRESETS, default="spec_teacher")
    add_problem_options(parser)
    common.add_turn_options(parser)
    options = parser.parse_args()
    problem = read_problem(options)
    if options.worker:
        print(json.dumps(run_worker(options.worker, problem)))
        return 0
    data: dict[str, Any] = {"problem": asdict(problem), "threads": options.threads, "rounds": options.rounds}
    data |= measure(problem, options.threads, options.rounds)
    data["failures"] = check(data)
    return evidence.conclude(options.results, NAME, data, format_results(data))


if __name__ == "__main__":
    common.run_main(main)
