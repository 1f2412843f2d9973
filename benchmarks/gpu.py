"""How much of a GPU does training use, with the teacher at each step and with its states stored?

The product's own loop (see `benchmarks.training`), without checkpoints and validations, on one CUDA device in bfloat16;
each system also with the student compiled by `torch.compile`, which the product leaves out until it is measured to
gain. Utilisation is that of the best matrix product found on the same device (see `training.utilisation`).

    python -m benchmarks.gpu

`--device cpu` with small sizes tries the program where no GPU is at hand.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks import common, evidence
from benchmarks.common import BenchmarkError
from benchmarks.machine import describe_machine, read_machine
from benchmarks.training import OURS, OURS_STORED, run_ours
from benchmarks.training_problem import Parts, Problem, add_problem_options, read_problem
from cvm_translator.config.model_presets import MODEL_PRESETS
from cvm_translator.config.schema import ModelConfig
from cvm_translator.models.transformer import CvmTransformer
from cvm_translator.teachers.states import TeacherStates

NAME = "gpu"
COMPILED = ", compiled"
SYSTEMS = (OURS, OURS + COMPILED, OURS_STORED, OURS_STORED + COMPILED)
MIN_UTILISATION = 0.35
"""Of the better of the systems with stored states."""


def run_worker(name: str, problem: Problem, device: torch.device) -> dict[str, float]:
    """Tokens a second, utilisation, and the largest memory of one system."""
    parts = Parts.build(problem)
    parts.student.to(device)
    if parts.teacher is not None:
        parts.teacher.to(device)
    if name.endswith(COMPILED):
        parts.student.compile(dynamic=True)
    with tempfile.TemporaryDirectory() as folder:
        stored = TeacherStates if name.startswith(OURS_STORED) else None
        figures = run_ours(parts, Path(folder), stored=stored, is_budgeted=True, device=device)
    if device.type == "cuda":
        figures["memory_mib"] = torch.cuda.max_memory_allocated(device) / 2**20
    return figures


def check(systems: dict[str, dict[str, float]]) -> dict[str, list[str]]:
    best = max(systems[name].get("utilisation", 0.0) for name in SYSTEMS if name.startswith(OURS_STORED))
    found = [] if best >= MIN_UTILISATION else [f"{best:.1%}"]
    return {f"with stored states at least {MIN_UTILISATION:.0%} of the peak are used": found}


def format_results(data: dict[str, Any]) -> str:
    problem = data["problem"]
    rows = [
        [
            name,
            f"{figures['tokens_per_second']:,.0f}",
            f"{figures['utilisation']:.1%}" if "utilisation" in figures else "-",
            f"{figures['padding_efficiency']:.1%}",
            f"{figures['memory_mib']:,.0f}" if "memory_mib" in figures else "-",
        ]
        for name, figures in data["systems"].items()
    ]
    return "\n".join(
        [
            "# Training on a GPU",
            "",
            *evidence.describe_checks(data["failures"]),
            "",
            f"Student {problem['student']} ({data['num_parameters']:,} parameters, vocabulary"
            f" {problem['vocabulary']:,}), teacher {problem['teacher']}; batches of as many tokens as"
            f" {problem['batch_size']} sentences have, {problem['num_steps']} steps after {problem['num_warm_up']};"
            f" medians of {data['rounds']} rounds on {data['device']}.",
            "",
            describe_machine(data["machine"]),
            "",
            evidence.markdown_table(["system", "target tokens/s", "of the peak", "not padding", "MiB"], rows),
        ]
    )


def build_parser() -> argparse.ArgumentParser:
    parser = common.build_plain_parser("Measure training on a GPU.")
    parser.add_argument("--device", default="cuda", help="of PyTorch; cpu to try the program")
    parser.add_argument("--teacher", choices=MODEL_PRESETS, default="spec_teacher")
    add_problem_options(parser)
    parser.set_defaults(batch_size=512, num_steps=50, num_warm_up=20)
    common.add_turn_options(parser)
    return parser


def main() -> int:
    options = build_parser().parse_args()
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise BenchmarkError(
            "this machine has no CUDA device: run it on one that has, or try the program with --device cpu --student"
            " tiny --teacher tiny --vocabulary 1000 --batch-size 8 --num-steps 5"
        )
    problem = read_problem(options)
    if options.worker:
        print(json.dumps(run_worker(options.worker, problem, device)))
        return 0
    turns = common.Turns("benchmarks.gpu", SYSTEMS, asdict(problem) | {"device": options.device}, options)
    machine = read_machine()
    systems = turns.measure()
    sizes = ModelConfig.model_validate(options.student)
    data = {
        "machine": machine,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "the processor",
        "problem": asdict(problem),
        "num_parameters": CvmTransformer(sizes, options.vocabulary).num_parameters(),
        "rounds": options.rounds,
        "systems": systems,
        "failures": check(systems),
    }
    code = evidence.conclude(options.results, NAME, data, format_results(data))
    turns.forget()
    return code


if __name__ == "__main__":
    common.run_main(main)
