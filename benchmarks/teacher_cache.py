"""What do the teacher's stored states save, and do they change the losses?

Ours against ours, with the sentences and sizes of `benchmarks.training`: once the teacher runs in every step, once its
last hidden states are read back. Steps per second of both, the time that storing the states took, and the largest
relative difference of any step's loss in any round, which bfloat16 bounds. Whether that difference would tell a wrong
cache is shown by a third system, which reads for each token the states of the one before: its losses must differ.

    python -m benchmarks.teacher_cache

Systems take turns, a process each; medians of the rounds are compared.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks import common, evidence
from benchmarks.machine import describe_machine, read_machine
from benchmarks.training import OURS, OURS_STORED, run_ours
from benchmarks.training_problem import Parts, Problem, add_problem_options, read_problem
from cvm_translator.config.model_presets import MODEL_PRESETS
from cvm_translator.teachers.states import TeacherStates

NAME = "teacher_cache"
CONTROL = "control, states of the token before"
MIN_SPEEDUP = 1.5
MAX_LOSS_DIFFERENCE = 2.0**-8
"""Relative: half a step of bfloat16's eight bits."""


class MixedUpStates(TeacherStates):
    """What a cache in the wrong order would hand out."""

    def gather(self, indices: NDArray[np.int64]) -> torch.Tensor:
        return super().gather(indices).roll(1, 0)


SYSTEMS: dict[str, type[TeacherStates] | None] = {OURS: None, OURS_STORED: TeacherStates, CONTROL: MixedUpStates}


def run_worker(name: str, problem: Problem) -> dict[str, Any]:
    losses: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        figures = run_ours(Parts.build(problem), Path(folder), stored=SYSTEMS[name], losses=losses)
    return figures | {"losses": losses}


def summarise(rounds: Sequence[Mapping[str, Mapping[str, Any]]]) -> dict[str, Any]:
    """Speeds and losses of all rounds."""
    names = (OURS, OURS_STORED)
    speeds = {name: statistics.median(answers[name]["tokens_per_second"] for answers in rounds) for name in names}
    return {
        "tokens_per_second": speeds,
        "states_seconds": statistics.median(answers[OURS_STORED]["states_seconds"] for answers in rounds),
        "speedup": speeds[OURS_STORED] / speeds[OURS],
        "largest_loss_difference": max(_find_largest_difference(answers, OURS_STORED) for answers in rounds),
        "control_loss_difference": min(_find_largest_difference(answers, CONTROL) for answers in rounds),
    }


def _find_largest_difference(answers: Mapping[str, Mapping[str, Any]], name: str) -> float:
    """Of any step's loss from that of the online teacher, relative."""
    pairs = zip(answers[OURS]["losses"], answers[name]["losses"], strict=True)
    return max(float(abs(a - b) / abs(a)) for a, b in pairs)


def check(data: dict[str, Any]) -> dict[str, list[str]]:
    speedup, difference, control = (
        data[key] for key in ("speedup", "largest_loss_difference", "control_loss_difference")
    )
    return {
        f"stored states make steps at least {MIN_SPEEDUP:g} times as fast": (
            [] if speedup >= MIN_SPEEDUP else [f"{speedup:.2f} times"]
        ),
        f"every step's loss is the same within {MAX_LOSS_DIFFERENCE:.4f} of it": (
            [] if difference <= MAX_LOSS_DIFFERENCE else [f"{difference:.4f}"]
        ),
        "states of the wrong token would exceed that": [] if control > MAX_LOSS_DIFFERENCE else [f"{control:.4f}"],
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
            f" took {data['states_seconds']:.0f} s, once. Largest relative difference of a step's loss in any round:"
            f" {data['largest_loss_difference']:.5f}; with the states of the wrong token"
            f" {data['control_loss_difference']:.5f}.",
            "",
            describe_machine(data["machine"]),
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
    turns = common.Turns("benchmarks.teacher_cache", tuple(SYSTEMS), asdict(problem), options)
    data: dict[str, Any] = {"machine": read_machine(), "problem": asdict(problem)}
    data |= {"threads": options.threads, "rounds": options.rounds}
    data |= summarise(turns.ask())
    data["failures"] = check(data)
    code = evidence.conclude(options.results, NAME, data, format_results(data))
    turns.forget()
    return code


if __name__ == "__main__":
    common.run_main(main)
