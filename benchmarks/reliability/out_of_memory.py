"""A supervised run whose memory runs out in the middle of its training: does it go on with smaller micro-batches?

Two runs with all the memory there is tell what a step needs: one with whole batches, one with batches cut into four.
A third, with whole batches again, trains some steps; then the address space of its trainer and of its supervisor (which
the next trainer inherits) is limited to the middle between the two needs, so that the next step's allocation truly
fails. Nothing is injected into the program. Checked are:

- the supervisor says that memory ran out in a training step, and starts the trainer with smaller micro-batches;
- the run goes on from its newest checkpoint, and says that it is inexact;
- each step has the target tokens of the unlimited run's, so the effective batch is the same, and its loss within 0.1 %.

    python -m benchmarks.reliability.out_of_memory

It begins anew each time. The program ends with 1 if a check fails.
"""

from __future__ import annotations

import argparse
import resource
import shutil
import sys
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks import common, evidence
from benchmarks.common import Arm, BenchmarkError
from benchmarks.reliability import tiny_run
from benchmarks.reliability.supervised import SupervisedRun
from cvm_translator.runs.micro_batches import read_factors

NAME = "out_of_memory"
# Wide layers and a large batch, so that the activations of a step are most of what it allocates.
CHANGES: dict[str, Any] = {
    "teacher": {
        "model": {"dim": 64, "feed_forward_dim": 2048, "dropout": 0.0},
        "training": {"batch_size": 512, "num_iterations": 10_000, "precision": "float32", "checkpoint_every_steps": 2},
    }
}
CUT = "teacher.training.grad_accum_steps=4"
FREE_STEPS = 4
"""After which the memory is limited."""
MIN_DIFFERENCE_BYTES = 32 << 20
TOLERANCE = 1e-3

TOLD = "the supervisor says that memory ran out, and starts the trainer with smaller micro-batches"
GOES_ON = "the run goes on from its newest checkpoint, and says that it is inexact"
SAME = "each step has the tokens of the unlimited run's and its loss within 0.1 %"

Steps = dict[int, tuple[int, float]]
"""Tokens and loss of each step, as computed last."""


def read_steps(run: SupervisedRun) -> Steps:
    return {event["step"]: (event["num_tokens"], event["loss"]) for event in run.find("train")}


def measure_need(arm: Arm, num_steps: int) -> tuple[int, Steps]:
    """The largest address space that a run's trainer has had, and its steps."""
    with SupervisedRun(arm) as run:
        run.wait_for_save(num_steps)
        lines = Path(f"/proc/{run.trainer}/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmPeak:")), read_steps(run)


def limit_memory(run: SupervisedRun, num_bytes: int) -> None:
    """Of the trainer, and of whoever the supervisor starts after it."""
    for pid in (run.process.pid, run.trainer):
        resource.prlimit(pid, resource.RLIMIT_AS, (num_bytes, num_bytes))


def find_failures(run: SupervisedRun, expected: Steps, num_steps: int) -> dict[str, list[str]]:
    """What each check found wrong; a check that holds has an empty list."""
    restarts, resumed, steps = run.find("warning", "restart"), run.find("resumed"), read_steps(run)
    wrong = [event["message"] for event in restarts if "out of memory" not in event["message"]]
    if not restarts or "micro-batches" not in restarts[-1]["message"]:
        wrong.append(f"{len(restarts)} restarts without a change of the micro-batches")
    stuck = [f"step {event['step']}: said to be exact" for event in resumed[-1:] if event["exact"]]
    if not resumed or resumed[0]["step"] < FREE_STEPS:
        stuck.append(f"resumed from {[event['step'] for event in resumed]}")
    different = []
    for step in range(1, num_steps + 1):
        (tokens, loss), (num_tokens, found) = expected[step], steps.get(step, (0, 0.0))
        if num_tokens != tokens or abs(found - loss) > TOLERANCE * loss:
            different.append(f"step {step}: {num_tokens} tokens, loss {found}, expected {tokens}, {loss}")
    return {TOLD: wrong, GOES_ON: stuck, SAME: different}


def run_benchmark(options: Namespace) -> dict[str, Any]:
    work = options.work.resolve()
    shutil.rmtree(work, ignore_errors=True)
    config = tiny_run.write_config(work, **CHANGES)
    whole_bytes, expected = measure_need(tiny_run.build_arm(work, "whole", config), options.steps)
    cut_bytes, _ = measure_need(tiny_run.build_arm(work, "cut", config, CUT), FREE_STEPS)
    if whole_bytes - cut_bytes < MIN_DIFFERENCE_BYTES:
        raise BenchmarkError(f"whole batches need {whole_bytes:,} bytes, cut ones {cut_bytes:,}: they must differ more")
    limit_bytes = (whole_bytes + cut_bytes) // 2
    with SupervisedRun(tiny_run.build_arm(work, "limited", config)) as run:
        run.wait_for_save(FREE_STEPS)
        limit_memory(run, limit_bytes)
        run.wait_for_save(options.steps)
    return {
        "whole_bytes": whole_bytes,
        "cut_bytes": cut_bytes,
        "limit_bytes": limit_bytes,
        "num_steps": options.steps,
        "messages": [event["message"] for event in run.find("warning", "restart")],
        "resumed": [{name: event[name] for name in ("step", "exact", "differences")} for event in run.find("resumed")],
        "factors": read_factors(run.arm.layout.micro_batches),
        "failures": find_failures(run, expected, options.steps),
    }


def format_results(data: Mapping[str, Any]) -> str:
    """The checks and what was said, as Markdown."""
    whole, cut, limit = (f"{data[name] / 2**20:,.0f} MiB" for name in ("whole_bytes", "cut_bytes", "limit_bytes"))
    said = "; ".join(f"step {r['step']}, {', '.join(r['differences']) or 'exact'}" for r in data["resumed"])
    lines = [
        "# A run whose memory runs out",
        "",
        f"With whole batches the trainer needs an address space of {whole}, with batches cut into four {cut}; after"
        f" step {FREE_STEPS} the run was limited to {limit}, and was followed to step {data['num_steps']}:",
        "",
        *evidence.describe_checks(data["failures"]),
        "",
        "What the supervisor said:",
        "",
        *(f"    {message}" for message in data["messages"]),
        "",
        f"What the trainer said when it resumed: {said}.",
    ]
    return "\n".join(lines)


def build_parser() -> argparse.ArgumentParser:
    parser = common.build_plain_parser("Let the memory of a run become too small while it trains.")
    parser.add_argument("--steps", type=int, default=12, metavar="N", help="how far the runs are followed")
    parser.add_argument("--work", type=Path, default=common.RESULTS / "work" / NAME)
    return parser


def main() -> int:
    options = build_parser().parse_args()
    data = run_benchmark(options)
    return evidence.conclude(options.results, NAME, data, format_results(data))


if __name__ == "__main__":
    if sys.platform != "linux":
        sys.exit("error: this benchmark limits another process's memory: run it on Linux")
    common.run_main(main)
