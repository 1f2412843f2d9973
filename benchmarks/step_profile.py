"""Where does the time of a training step go? A table and a picture.

The step is the product's own on the sentences and sizes of `benchmarks.training`, watched by PyTorch's profiler, which
makes it slower by itself. Operations are grouped by what they do. Of matrix products the arithmetic is known, so they
are compared with the processor's measured peak; the others move memory.

    python -m benchmarks.step_profile [--teacher spec_teacher]
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks import common, evidence
from benchmarks.machine import describe_machine, read_machine
from benchmarks.training_problem import ALPHA, BETA, TEMPERATURE, Parts, add_problem_options, read_problem
from cvm_translator.cli.memory import keep_freed_memory
from cvm_translator.config.model_presets import MODEL_PRESETS
from cvm_translator.config.schema import TrainingConfig
from cvm_translator.losses import DistillationLoss
from cvm_translator.observe.plot_style import MUTED, STUDENT, build_figure, styled, to_png
from cvm_translator.runs import atomic
from cvm_translator.training.objectives import DistillationObjective
from cvm_translator.training.optimizer import build_optimizer
from cvm_translator.training.spikes import SpikeWindow
from cvm_translator.training.step import train_step
from cvm_translator.training.utilisation import measure_peak

NAME = "step_profile"
IMAGE = common.REPOSITORY / "docs" / "images" / "training_step.png"
MATRIX_PRODUCTS = "matrix products"
GROUPS = {
    MATRIX_PRODUCTS: ("mm", "addmm", "bmm", "baddbmm", "mkldnn", "matmul", "linear"),
    "optimizer": ("fused_adamw", "foreach"),
    "softmax": ("softmax", "log_softmax", "logsumexp"),
    "layer norm": ("native_layer_norm", "layer_norm"),
    "dropout": ("native_dropout", "dropout", "bernoulli"),
    "copies and casts": ("copy", "to", "clone", "cat", "contiguous", "fill", "zero", "zeros", "empty", "stack"),
    "gather and scatter": ("index", "embedding", "gather", "scatter", "select", "slice", "nonzero"),
}
"""Names of operations, or what they begin with before an underscore."""
OTHER = "sums, products, ReLU and the rest"
BOUNDS = {MATRIX_PRODUCTS: "arithmetic", OTHER: "memory and calls", "gather and scatter": "memory and calls"}


def find_group(operation: str) -> str:
    """The group of an operation of the profiler, such as aten::addmm."""
    name = operation.split("::")[-1].strip("_")

    def is_of(parts: Sequence[str]) -> bool:
        return any(name == part or name.startswith(f"{part}_") for part in parts)

    return next((group for group, parts in GROUPS.items() if is_of(parts)), OTHER)


def measure(options: Any) -> dict[str, Any]:
    torch.set_num_threads(options.threads)
    keep_freed_memory()  # as the command line does
    machine = read_machine()
    problem = read_problem(options)
    parts = Parts.build(problem)
    loss = DistillationLoss(TEMPERATURE, ALPHA if parts.teacher else 0.0, BETA if parts.teacher else 1.0)
    objective = DistillationObjective(parts.student, loss, parts.teacher)
    settings = TrainingConfig(num_iterations=1000, batch_size=problem.batch_size, learning_rate=1e-4)
    optimizer, spikes = build_optimizer(parts.student, settings), SpikeWindow(num_steps=1000, threshold=math.inf)
    order = np.argsort(parts.dataset.lengths[:, 1], kind="stable")
    order = order[: len(order) // problem.batch_size * problem.batch_size]
    chosen = np.split(order, len(order) // problem.batch_size)
    places = np.random.default_rng(5).permutation(len(chosen))[: problem.num_steps + problem.num_warm_up]
    batches = [parts.dataset.batch(chosen[place]) for place in places]
    parts.student.train()

    def step(number: int) -> None:
        train_step(parts.student, objective, optimizer, batches[number], settings, spikes, learning_rate=1e-4)

    for number in range(problem.num_warm_up):
        step(number)
    start = time.perf_counter()
    for number in range(problem.num_steps):
        step(number)
    plain_seconds = (time.perf_counter() - start) / problem.num_steps
    with profile(activities=[ProfilerActivity.CPU], with_flops=True) as watched:
        for number in range(problem.num_steps):
            step(number)
    groups = {name: {"ms": 0.0, "calls": 0.0, "operations": 0.0} for name in (*GROUPS, OTHER)}
    for event in watched.key_averages():
        figures = groups[find_group(event.key)]
        figures["ms"] += event.self_cpu_time_total / 1000 / problem.num_steps
        figures["calls"] += event.count / problem.num_steps
        figures["operations"] += event.flops / problem.num_steps
    return {
        "machine": machine,
        "student": problem.student,
        "teacher": problem.teacher,
        "vocabulary": problem.vocabulary,
        "batch_size": problem.batch_size,
        "threads": options.threads,
        "step_ms": 1000 * plain_seconds,
        "peak": measure_peak(settings.precision, torch.device("cpu")),
        "groups": dict(sorted(groups.items(), key=lambda item: -item[1]["ms"])),
    }


@styled
def plot(data: dict[str, Any]) -> bytes:
    """A bar for each group, longest first."""
    figure, (axes,) = build_figure(1, 1, 8.0, 3.6)
    names, values = list(data["groups"]), [figures["ms"] for figures in data["groups"].values()]
    axes.barh(names[::-1], values[::-1], color=STUDENT, height=0.62)
    for place, value in enumerate(values[::-1]):
        axes.annotate(
            f"{value:.0f} ms, {value / sum(values):.0%}",
            (value, place),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            color=MUTED,
        )
    axes.grid(visible=False, axis="y")
    axes.set_xlim(0, 1.22 * max(values))
    axes.set_xlabel("ms a step")
    axes.set_title(
        f"A training step of {data['student']}" + (f", teacher {data['teacher']}" if data["teacher"] else "")
    )
    return to_png(figure)


def format_results(data: dict[str, Any]) -> str:
    total = sum(figures["ms"] for figures in data["groups"].values())
    rows = []
    for name, figures in data["groups"].items():
        rate = figures["operations"] / (figures["ms"] / 1000) if figures["ms"] else 0.0
        reached = f": {rate / 1e9:,.0f} of {data['peak'] / 1e9:,.0f} GFLOP/s" if name == MATRIX_PRODUCTS else ""
        rows.append(
            [
                name,
                f"{figures['ms']:.1f}",
                f"{figures['ms'] / total:.0%}",
                f"{figures['calls']:,.0f}",
                BOUNDS.get(name, "memory") + reached,
            ]
        )
    return "\n".join(
        [
            "# A training step",
            "",
            f"Student {data['student']}, teacher {data['teacher'] or 'none'}, vocabulary {data['vocabulary']:,},"
            f" {data['batch_size']} sentences, {data['threads']} threads: {data['step_ms']:.0f} ms a step,"
            f" {total:.0f} ms under the profiler.",
            "",
            describe_machine(data["machine"]),
            "",
            evidence.markdown_table(["part", "ms", "share", "calls", "bound by"], rows),
        ]
    )


def main() -> int:
    parser = common.build_plain_parser("Tell where the time of a training step goes.")
    parser.add_argument("--teacher", choices=MODEL_PRESETS, help="distil from a teacher of these sizes")
    parser.add_argument("--image", type=Path, default=IMAGE)
    add_problem_options(parser)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), metavar="T")
    options = parser.parse_args()
    data = measure(options)
    atomic.write_bytes(options.image, plot(data))
    return evidence.conclude(options.results, NAME, data | {"failures": {}}, format_results(data))


if __name__ == "__main__":
    common.run_main(main)
