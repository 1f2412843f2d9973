"""Real runs judged by the guard: healthy seeds, which must never roll back, and faults, which must be found at once.

The detector's own rates are measured by simulation (`detector`); here whole runs are trained. Checked are:

- a run with each of `--seeds` ends without a rollback, an emergency or a halt;
- each fault, planted right after a validation, is answered by a rollback at the next one or before it (a loss spike
  that the guard sees in the batches themselves).

Faults, of which the guard is told nothing: each weight matrix gets noise once; the learning rate is ten times as high
from then on; each source has its neighbour's target; the teacher recommends other words.

    python -m benchmarks.reliability.detection

All runs share one cached teacher and end where the fault has been found or not. The program can be killed and started
again; it ends with 1 if a check fails.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks import common, evidence
from benchmarks.common import Arm, BenchmarkError

NAME = "detection"
SMALL_CONFIG = Path(__file__).with_name("small.yaml")
FAULTS = {
    "weight_noise": "{{kind: weight_noise, from_step: {step}, num_steps: 1, factor: 0.5}}",
    "learning_rate": "{{kind: learning_rate, from_step: {step}, factor: 10}}",
    "shuffled_targets": "{{kind: shuffled_targets, from_step: {step}}}",
    "garbage_teacher": "{{kind: garbage_teacher, from_step: {step}}}",
}
SETTINGS = ("distillation.num_iterations={steps}", "validation.every_steps={every}", "tensorboard=false")


def build_arms(options: Namespace) -> list[Arm]:
    """The healthy seeds, then the faults with the first of them."""
    config, work = options.config.resolve(), options.work.resolve()
    shared = (
        f"teacher.cache_dir={work / 'teachers'}",
        f"num_threads={options.threads_per_arm}",
        *(text.format(steps=options.steps, every=options.every) for text in SETTINGS),
        *options.set,
    )
    healthy = {f"healthy_{seed}": f"seed={seed}" for seed in find_seeds(options)}
    arms = [Arm(name, config, (*shared, setting), work / name) for name, setting in healthy.items()]
    first = f"seed={find_seeds(options)[0]}"
    for name, template in FAULTS.items():
        fault = f"fault_injection=[{template.format(step=options.from_validation + 1)}]"
        # Long enough to be found and rolled back once; what becomes of it later is `injected_faults`' subject.
        arms.append(Arm(name, config, (*shared, first, "guard.max_rollbacks=1", fault), work / name))
    return arms


def find_seeds(options: Namespace) -> list[int]:
    return list(range(options.first_seed, options.first_seed + options.seeds))


def describe_arm(arm: Arm) -> dict[str, Any]:
    """What the guard said of a finished run."""
    report = evidence.read_report(arm)
    verdicts = evidence.find_events(arm, "verdict")
    rollbacks = evidence.find_events(arm, "rollback")
    return {
        "bleu": report["test"][report["deployed"]]["scores"]["bleu"]["value"],
        "verdicts": [
            {name: event.get(name) for name in ("step", "attempt", "verdict", "action", "drop", "drop_lower_bound")}
            for event in verdicts
        ],
        "rollbacks": [{name: event[name] for name in ("from_step", "to_step", "reason")} for event in rollbacks],
        "halted": report["halted"],
    }


def is_answer(rollback: Mapping[str, Any], from_validation: int, every: int) -> bool:
    """Whether a rollback answers a fault that was planted after the validation at `from_validation`.

    Where the very first batches of the fault are rejected, the loop goes back from the validation's own step.
    """
    num_steps = rollback["from_step"] - from_validation
    return bool(0 < num_steps <= every or (num_steps == 0 and rollback["reason"].startswith("emergency: ")))


def find_failures(runs: Mapping[str, Any], from_validation: int, every: int) -> dict[str, list[str]]:
    """What each check found wrong; a check that holds has an empty list."""
    healthy = {name: run for name, run in runs.items() if name not in FAULTS}
    return {
        "a healthy run never rolls back or halts": [
            name for name, run in healthy.items() if run["rollbacks"] or run["halted"]
        ],
        "a fault is found by the validation that follows it": [
            name
            for name in FAULTS
            if not any(is_answer(rollback, from_validation, every) for rollback in runs[name]["rollbacks"])
        ],
    }


def collect_results(arms: list[Arm], options: Namespace) -> dict[str, Any]:
    runs = {arm.name: describe_arm(arm) for arm in arms}
    return {
        "config": options.config.name,
        "settings": list(options.set),
        "num_steps": options.steps,
        "every_steps": options.every,
        "from_validation": options.from_validation,
        "num_healthy": options.seeds,
        "setting": evidence.describe_setting(arms[0]),
        "runs": runs,
        "failures": find_failures(runs, options.from_validation, options.every),
    }


def format_results(data: Mapping[str, Any]) -> str:
    """The checks and the tables as Markdown."""
    healthy = {name: run for name, run in data["runs"].items() if name not in FAULTS}
    verdicts = [verdict for run in healthy.values() for verdict in run["verdicts"]]
    drops = [verdict["drop"] for verdict in verdicts if verdict["drop"] is not None]
    num_rollbacks = sum(len(run["rollbacks"]) for run in healthy.values())
    num_warnings = sum(verdict["verdict"] == "warning" for verdict in verdicts)
    lines = [f"# Detection in real runs: {evidence.describe_config(data)}", ""]
    lines += [
        *evidence.describe_checks(data["failures"]),
        "",
        f"{len(healthy)} healthy runs of {data['num_steps']:,} steps with {len(verdicts)} validations of"
        f" {data['setting']['corpus']['validation']:,} sentences: {num_rollbacks} rollbacks, {num_warnings} warnings;"
        " the largest drop against"
        f" the best was {max(drops, default=0.0):+.1%}. BLEU of the int8 students on the test set:"
        f" {min(run['bleu'] for run in healthy.values()):.2f} to {max(run['bleu'] for run in healthy.values()):.2f}.",
        "",
        f"Faults begin after the validation at step {data['from_validation']:,}; the next one is at step"
        f" {data['from_validation'] + data['every_steps']:,}:",
        "",
    ]
    rows = [
        [name, f"{rollback['from_step']:,} to {rollback['to_step']:,}", rollback["reason"]]
        for name in FAULTS
        for rollback in data["runs"][name]["rollbacks"]
    ]
    return "\n".join([*lines, evidence.markdown_table(["fault", "rolled back from step", "reason"], rows)])


def main() -> int:
    parser = common.build_parser(
        "Train healthy seeds and faulty runs under the guard.", SMALL_CONFIG, common.RESULTS / "work" / NAME
    )
    parser.add_argument("--seeds", type=int, default=20, metavar="N", help="healthy runs")
    parser.add_argument("--first-seed", type=int, default=101)
    parser.add_argument("--steps", type=int, default=600, help="of each run")
    parser.add_argument("--every", type=int, default=100, metavar="STEPS", help="cadence of the validations")
    parser.add_argument("--from-validation", type=int, default=300, metavar="STEP", help="faults begin one step later")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at once")
    options = parser.parse_args()
    if options.from_validation % options.every or options.from_validation + options.every > options.steps:
        raise BenchmarkError(f"--from-validation {options.from_validation} is no validation that another one follows")
    arms = build_arms(options)
    common.run_arms(arms, options.jobs, options.threads_per_arm)
    data = collect_results(arms, options)
    return evidence.conclude(options.results, NAME, data, format_results(data))


if __name__ == "__main__":
    common.run_main(main)
