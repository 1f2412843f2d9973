"""How much of a GPU does training use, with the teacher at each step and with its states stored?

The product's own loop (see `benchmarks.training`), without checkpoints and validations, on one CUDA device in bfloat16:
through PyTorch's compiler, as the product trains there by default, and without it. All systems are in one process,
since compiling takes a minute, and take turns; medians of the rounds are compared, and what is compiled in the first is
part of it. Utilisation is that of the best matrix product found on the same device (see `training.utilisation`).

    python -m benchmarks.gpu

`--device cpu` with small sizes tries the program where no GPU is at hand.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
from dataclasses import asdict, replace
from functools import partial
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
from cvm_translator.training.device import build_autocast

NAME = "gpu"
EAGER = ", not compiled"
SYSTEMS = (OURS, OURS + EAGER, OURS_STORED, OURS_STORED + EAGER)
MIN_UTILISATION = 0.35
"""Of the better of the systems with stored states."""
NUM_PAIRS = 100_000
"""Of the corpus: some 25 batches, so that its sentences and states are made in seconds; a larger one would pad less."""


def measure(problem: Problem, device: torch.device, num_rounds: int) -> dict[str, dict[str, float]]:
    """Of each system the medians of tokens a second, utilisation, share that is no padding, and memory beside the
    weights."""
    first = Parts.build(problem)
    assert first.teacher is not None
    first.teacher.to(device)
    parts = {name: replace(first, student=copy.deepcopy(first.student).to(device)) for name in SYSTEMS}
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in SYSTEMS}
    with tempfile.TemporaryDirectory() as folder:
        states = TeacherStates(Path(folder), first.teacher, "benchmark", first.dataset)
        states.make(first.teacher, partial(build_autocast, "bfloat16", device), lambda: None)
        for number in range(num_rounds):
            for name in SYSTEMS:
                figures = _measure_once(name, parts[name], Path(folder), states, device)
                told = ", ".join(f"{key} {value:,.3f}" for key, value in figures.items())
                print(f"round {number + 1} of {num_rounds}, {name}: {told}", flush=True)
                rounds[name].append(figures)
    return {
        name: {key: statistics.median(figures[key] for figures in found) for key in found[0]}
        for name, found in rounds.items()
    }


def _measure_once(
    name: str, parts: Parts, folder: Path, states: TeacherStates, device: torch.device
) -> dict[str, float]:
    is_cuda = device.type == "cuda"
    if is_cuda:
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    figures = run_ours(
        parts,
        folder,
        stored=states if name.startswith(OURS_STORED) else None,
        is_budgeted=True,
        is_compiled=not name.endswith(EAGER),
        device=device,
    )
    if is_cuda:
        figures["memory_mib"] = (torch.cuda.max_memory_allocated(device) - before) / 2**20
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
            evidence.markdown_table(
                ["system", "target tokens/s", "of the peak", "not padding", "MiB beside the weights"], rows
            ),
        ]
    )


def build_parser() -> argparse.ArgumentParser:
    parser = common.build_plain_parser("Measure training on a GPU.")
    parser.add_argument("--device", default="cuda", help="of PyTorch; cpu to try the program")
    parser.add_argument("--teacher", choices=MODEL_PRESETS, default="spec_teacher")
    add_problem_options(parser)
    parser.set_defaults(batch_size=4096, num_steps=15, num_warm_up=5, num_pairs=NUM_PAIRS)
    parser.add_argument("--rounds", type=int, default=5, metavar="N")
    return parser


def main() -> int:
    options = build_parser().parse_args()
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise BenchmarkError(
            "this machine has no CUDA device: run it on one that has, or try the program with --device cpu --student"
            " tiny --teacher tiny --vocabulary 1000 --batch-size 8 --num-pairs 400"
        )
    problem = read_problem(options)
    machine = read_machine()
    systems = measure(problem, device, options.rounds)
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
    return evidence.conclude(options.results, NAME, data, format_results(data))


if __name__ == "__main__":
    common.run_main(main)
