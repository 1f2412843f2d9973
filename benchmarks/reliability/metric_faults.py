"""Metrics that crash or give NaN in the validations of a real run: does the guard ever decide by them?

A small real run validates every few steps. In a process of its own the same run is done again, and in random
validations one of its metrics raises one of several exceptions, or has statistics or a score that is no number. The
teacher's own score and the gate are left alone. Checked are:

- such a validation is no decision, keeps the run going, and leaves the best where it was;
- it is told by a warning that names the metric;
- nothing is rolled back, and every loss is that of the run with sound metrics, bit for bit;
- what is delivered was the best of a validation with sound metrics.

    python -m benchmarks.reliability.metric_faults

It begins anew each time. The program ends with 1 if a check fails.
"""

from __future__ import annotations

import argparse
import random
import shutil
import subprocess
import sys
from argparse import Namespace
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import common, evidence
from benchmarks.common import Arm, BenchmarkError
from benchmarks.reliability import tiny_run
from benchmarks.reliability.kill_resume import read_losses
from cvm_translator.runs import atomic
from cvm_translator.runs.events import read_events

NAME = "metric_faults"
# Averaged weights and a moderate learning rate: quality only rises, and nothing else asks for a rollback.
CALM = {"learning_rate": 2.0e-3, "ema_decay": 0.9}
CHANGES: dict[str, Any] = {
    "teacher": {"training": CALM | {"num_iterations": 400, "validate_every_steps": 10}},
    "distillation": CALM | {"num_iterations": 600},
    "validation": {"every_steps": 10},
    "quantization": {"start_fraction": 0.0},
}
SHARE = 0.5
"""Of the validations that meet a fault."""
METRICS = ("bleu", "chrf")
FAULTS = ("RuntimeError", "MemoryError", "ZeroDivisionError", "NaN statistics", "infinite statistics", "NaN score")

NO_DECISION = "a validation with a broken metric is no decision and leaves the best where it was"
WARNED = "each of them is told by a warning that names the metric"
SAME = "nothing is rolled back, and every loss is that of the run with sound metrics, bit for bit"
DELIVERED = "what is delivered was the best of a validation with sound metrics"


# ------------------------------------------------------------------------------------------- in a process of its own


class Breaker:
    """Breaks metrics while a judge judges, and writes down where."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.done: list[dict[str, Any]] = []
        self.now: dict[str, Any] | None = None
        """The fault of the present validation."""

    def break_judge(self) -> None:
        """Let judges begin some of their validations with a fault."""
        from cvm_translator.training.judges import ValidationJudge

        judge = ValidationJudge.judge

        def broken(own: Any, state: Any, model: Any, bits: int) -> Any:
            if self.random.random() < SHARE:
                names = {"metric": self.random.choice(METRICS), "fault": self.random.choice(FAULTS)}
                self.now = {"stage": own.stage, "step": state.step, "attempt": state.attempt, **names}
                self.done.append(self.now)
            try:
                return judge(own, state, model, bits)
            finally:
                self.now = None

        ValidationJudge.judge = broken  # type: ignore[assignment, method-assign]

    def break_metric(self, kind: type[Any], name: str) -> None:
        """Let a metric meet the fault of the present validation."""
        statistics, score = kind.statistics, kind.score

        def broken_statistics(own: Any, *arguments: Any) -> Any:
            rows = statistics(own, *arguments)
            fault = self.now["fault"] if self.now and self.now["metric"] == name else None
            if fault in ("RuntimeError", "MemoryError", "ZeroDivisionError"):
                raise {"RuntimeError": RuntimeError, "MemoryError": MemoryError}.get(fault, ZeroDivisionError)(
                    "planted"
                )
            if fault in ("NaN statistics", "infinite statistics"):
                rows[self.random.randrange(len(rows))] = np.nan if fault == "NaN statistics" else np.inf
            return rows

        def broken_score(own: Any, aggregate: Any) -> Any:
            if self.now and self.now["metric"] == name and self.now["fault"] == "NaN score":
                return np.full(np.shape(aggregate)[:-1], np.nan)
            return score(own, aggregate)

        kind.statistics, kind.score = broken_statistics, broken_score


def run_broken(config: Path, run_dir: Path, seed: int) -> None:
    """The whole run with broken metrics; what was planted is left in the run folder."""
    from cvm_translator.config import load_config
    from cvm_translator.metrics.surface import Bleu, Chrf
    from cvm_translator.pipeline.distiller import run_pipeline

    breaker = Breaker(seed)
    breaker.break_judge()
    for name, kind in zip(METRICS, (Bleu, Chrf), strict=True):
        breaker.break_metric(kind, name)
    try:
        run_pipeline(load_config(config, [], run_dir), progress=False)
    finally:
        atomic.write_json(run_dir / "planted.json", breaker.done)


# ------------------------------------------------------------------------------------------------------------ checking


def find_failures(sound: Arm, broken: Arm, planted: list[dict[str, Any]]) -> dict[str, list[str]]:
    """What each check found wrong; a check that holds has an empty list."""
    failures: dict[str, list[str]] = {NO_DECISION: [], WARNED: [], SAME: [], DELIVERED: []}
    events = list(read_events(broken.layout.events))
    faults = {(fault["stage"], fault["attempt"], fault["step"]): fault for fault in planted}
    warning = ""
    best: dict[str, int | None] = {}
    for event in events:
        if event.get("code") == "no_decision":
            warning = event["message"]
        if event["kind"] == "rollback":
            failures[SAME].append(f"rolled back at step {event['step']}: {event['reason']}")
        if event["kind"] != "verdict":
            continue
        stage = event["stage"]
        fault = faults.get((stage, event["attempt"], event["step"]))
        if fault is not None:
            what = f"{stage} step {event['step']} ({fault['metric']}: {fault['fault']})"
            is_kept = event["action"] == "keep" and event["best_step"] == best.get(stage)
            if event["verdict"] != "no_decision" or not is_kept:
                failures[NO_DECISION].append(f"{what}: {event['verdict']}, {event['action']}, {event['best_step']}")
            if fault["metric"] not in warning:
                failures[WARNED].append(f"{what}: {warning}")
        best[stage], warning = event["best_step"], ""
    expected, losses = read_losses(sound), read_losses(broken)
    failures[SAME] += [
        str(key) for key in sorted(expected.keys() | losses.keys()) if losses.get(key) != expected.get(key)
    ]
    report = evidence.read_report(broken)
    if ("distil", 1, report["best_step"]) in faults:
        failures[DELIVERED].append(f"step {report['best_step']}")
    return failures


def run_benchmark(options: Namespace) -> dict[str, Any]:
    work = options.work.resolve()
    shutil.rmtree(work, ignore_errors=True)
    config = tiny_run.write_config(work, **CHANGES)
    sound, broken = (tiny_run.build_arm(work, name, config) for name in ("sound", "broken"))
    common.run_arms([sound], 1, 1)
    command = [sys.executable, "-m", "benchmarks.reliability.metric_faults", "--run", str(config), str(broken.folder)]
    done = subprocess.run([*command, "--seed", str(options.seed)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise BenchmarkError(f"the run with broken metrics failed: {done.stderr.strip().splitlines()[-1:]}")
    planted = atomic.read_json(broken.folder / "planted.json")
    verdicts = [event for event in read_events(broken.layout.events) if event["kind"] == "verdict"]
    return {
        "seed": options.seed,
        "num_validations": len(verdicts),
        "planted": planted,
        "verdicts": dict(Counter(event["verdict"] for event in verdicts)),
        "failures": find_failures(sound, broken, planted),
    }


def format_results(data: Mapping[str, Any]) -> str:
    """The checks and the table as Markdown."""
    counts = Counter((fault["metric"], fault["fault"]) for fault in data["planted"])
    lines = [
        "# Metrics that crash or are no number",
        "",
        *evidence.describe_checks(data["failures"]),
        "",
        f"{len(data['planted'])} of {data['num_validations']} validations met a fault; the verdicts were "
        + ", ".join(f"{name} {count}" for name, count in data["verdicts"].items())
        + ".",
        "",
    ]
    rows = [[fault, *(counts[metric, fault] for metric in METRICS)] for fault in FAULTS]
    return "\n".join([*lines, evidence.markdown_table(["fault", *METRICS], rows)])


def build_parser() -> argparse.ArgumentParser:
    parser = common.build_plain_parser("Break the metrics of a run's validations.")
    parser.add_argument("--seed", type=int, default=13, help="draws the faults")
    parser.add_argument("--work", type=Path, default=common.RESULTS / "work" / NAME)
    parser.add_argument("--run", nargs=2, type=Path, help=argparse.SUPPRESS)
    return parser


def main() -> int:
    options = build_parser().parse_args()
    if options.run:
        config, run_dir = options.run
        run_broken(config, run_dir, options.seed)
        return 0
    data = run_benchmark(options)
    return evidence.conclude(options.results, NAME, data, format_results(data))


if __name__ == "__main__":
    common.run_main(main)
