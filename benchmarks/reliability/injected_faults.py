"""Does the guard save a run that goes wrong? Planted faults, each with the guard on and off, beside a healthy run.

The faults are the documented setting `fault_injection`, of which the guard is told nothing: the learning rate times 50
for 200 steps, and every source paired with its neighbour's target from a step on. Checked are:

- with the guard, a faulty run rolls back, says why, changes the recipe, and what it delivers, translating the
  validation set in a fresh process, is no worse than its best validation;
- without the guard, the same run ends significantly worse on the test set (paired bootstrap, BLEU and chrF);
- a healthy run never rolls back.

    python -m benchmarks.reliability.injected_faults

All runs share one cached teacher. The program can be killed and started again; it ends with 1 if a check fails.
"""

from __future__ import annotations

import itertools
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks import common, evidence
from benchmarks.common import Arm
from cvm_translator.corpus.build import load_split
from cvm_translator.pipeline.measure import measure_folder
from cvm_translator.runs import atomic

NAME = "injected_faults"
SMALL_CONFIG = Path(__file__).with_name("small.yaml")
LEARNING_RATE_FACTOR = 50.0
TOLERANCE = 1e-6
"""Of a score of 0 to 100 that is computed twice from the same hypotheses."""

HEALTHY = ("healthy", "on")
FAULTS = {
    "learning_rate": "{{kind: learning_rate, from_step: {step}, num_steps: {num_steps}, factor: {factor}}}",
    "shuffled_targets": "{{kind: shuffled_targets, from_step: {step}}}",
}
# Off means off: a run without the guard also takes the loss spikes that the guard would keep from the weights.
GUARD: dict[str, tuple[str, ...]] = {"on": (), "off": ("guard.enabled=false", "guard.spike_threshold=1.0e9")}

Arms = dict[tuple[str, str], Arm]


def build_arms(options: Namespace) -> Arms:
    """By fault (or healthy) and guard (on or off)."""
    config, work = options.config.resolve(), options.work.resolve()
    shared = (f"teacher.cache_dir={work / 'teachers'}", f"num_threads={options.threads_per_arm}", *options.set)

    def build(name: str, *settings: str) -> Arm:
        return Arm(name, config, (*shared, *settings), work / name)

    arms = {HEALTHY: build("healthy")}
    for fault, template in FAULTS.items():
        text = template.format(step=options.from_step, num_steps=options.num_steps, factor=LEARNING_RATE_FACTOR)
        for guard, settings in GUARD.items():
            arms[fault, guard] = build(f"{fault}_guard_{guard}", *settings, f"fault_injection=[{text}]")
    return arms


# ------------------------------------------------------------------------------------------------------------- figures


def describe_arm(arm: Arm) -> dict[str, Any]:
    """The summary of a finished arm, its rollbacks, and its validation scores at its best and as delivered."""
    report = evidence.read_report(arm)
    best = max(evidence.find_validations(arm), key=lambda event: float(event["quality_score"]))
    return evidence.summarise(arm) | {
        "halt_reason": report["halt_reason"],
        "rollbacks": report["rollbacks"],
        "best_on_validation": {name: best["scores"][name] for name in evidence.COMPARED},
        "delivered_on_validation": score_delivered(arm),
    }


def score_delivered(arm: Arm) -> dict[str, float]:
    """BLEU and chrF on the validation set of the delivered files, loaded and run in a fresh process."""
    output, config = arm.folder / "delivered_on_validation.json", arm.load_config()
    if not output.exists():
        measure_folder(
            arm.layout.student / evidence.read_report(arm)["deployed"],
            {"validation": arm.layout.corpus / "validation.tsv"},
            output,
            beam_size=config.validation.beam_size,
            batch_size=config.validation.batch_size,
            device="cpu",
            num_threads=config.num_threads or 1,
        )
    hypotheses = atomic.read_json(output)["hypotheses"]["validation"]
    references = [pair.target for pair in load_split(arm.layout.corpus, "validation")]
    return {
        metric.name: float(metric.score(metric.statistics(hypotheses, references).sum(axis=0)))
        for metric in evidence.build_compared_metrics(arm)
    }


def find_failures(arms: Mapping[str, Any], compared: Mapping[str, Any]) -> dict[str, list[str]]:
    """What each check found wrong; a check that holds has an empty list."""
    guarded = [f"{fault}_guard_on" for fault in FAULTS]
    checks: dict[str, list[str]] = {
        "a healthy run never rolls back": ["healthy"] if arms["healthy"]["rollbacks"] else [],
        "a faulty run rolls back": [name for name in guarded if not arms[name]["rollbacks"]],
        "each rollback says why and changes the recipe": [
            name for name in guarded if not _changes_recipe(arms[name]["rollbacks"])
        ],
        "what a guarded run delivers is no worse than its best": [
            name
            for name in ("healthy", *guarded)
            for metric, best in arms[name]["best_on_validation"].items()
            if arms[name]["delivered_on_validation"][metric] < best - TOLERANCE
        ],
        "without the guard the run ends significantly worse": [
            f"{fault} ({metric})"
            for fault, by_metric in compared.items()
            for metric, figures in by_metric.items()
            if figures["difference"] >= 0 or figures["p_value"] >= evidence.SIGNIFICANCE
        ],
    }
    return checks


def _changes_recipe(rollbacks: list[dict[str, Any]]) -> bool:
    """Whether each rollback has a reason and reads other data than all before, later ones at a lower rate as well."""
    streams = [0, *(rollback["data_stream"] for rollback in rollbacks)]
    rates = [rollback["learning_rate_factor"] for rollback in rollbacks]
    is_lowered = all(later < earlier for earlier, later in itertools.pairwise(rates))
    return all(rollback["reason"] for rollback in rollbacks) and len(set(streams)) == len(streams) and is_lowered


# ------------------------------------------------------------------------------------------------------------- results


def collect_results(arms: Arms, options: Namespace) -> dict[str, Any]:
    described = {arm.name: describe_arm(arm) for arm in arms.values()}
    compared = {
        fault: evidence.plain_comparisons(evidence.compare_arms([arms[fault, "on"]], [arms[fault, "off"]]))
        for fault in FAULTS
    }
    return {
        "config": options.config.name,
        "settings": list(options.set),
        "from_step": options.from_step,
        "num_steps": options.num_steps,
        "setting": evidence.describe_setting(arms[HEALTHY]),
        "runs": described,
        "off_minus_on": compared,
        "failures": find_failures(described, compared),
    }


def format_results(data: Mapping[str, Any]) -> str:
    """The checks and the tables as Markdown."""
    lines = [f"# Injected faults: {evidence.describe_config(data)}", "", *evidence.describe_checks(data["failures"])]
    lines += [
        "",
        f"Faults begin at step {data['from_step']:,}: the learning rate times {LEARNING_RATE_FACTOR:g} for"
        f" {data['num_steps']} steps; shuffled targets until the end. Scores are those of the int8 student, quality is"
        f" relative to the teacher (1; {data['setting']['teacher']['bleu']:.2f} BLEU on the test set).",
        "",
    ]
    rows = [
        [
            name,
            len(run["rollbacks"]),
            "yes" if run["halted"] else "-",
            *(
                f"{run[where]['bleu']:.2f} / {run[where]['chrf']:.2f}"
                for where in ("best_on_validation", "delivered_on_validation")
            ),
            f"{run['bleu']:.2f} / {run['chrf']:.2f}",
            f"{run['quality_score']:.3f}",
            f"{run['seconds']:.0f}",
        ]
        for name, run in data["runs"].items()
    ]
    header = [
        "run",
        "rollbacks",
        "halted",
        "best validation, BLEU / chrF",
        "delivered, on validation",
        "delivered, on test",
    ]
    lines += [evidence.markdown_table([*header, "quality on test", "seconds"], rows), "", "Rollbacks:", ""]
    rows = [
        [
            name,
            f"{rollback['step']} to {rollback['to_step']}",
            rollback["reason"],
            rollback["data_stream"],
            f"{rollback['learning_rate_factor']:g}",
        ]
        for name, run in data["runs"].items()
        for rollback in run["rollbacks"]
    ]
    lines += [evidence.markdown_table(["run", "steps", "reason", "data stream", "learning rate factor"], rows), ""]
    lines += [f"- {name} halted: {run['halt_reason']}" for name, run in data["runs"].items() if run["halted"]]
    lines += ["", "Guard off minus guard on, on the test set, with 95 % interval (paired bootstrap):", ""]
    rows = [
        [fault, *(evidence.describe_comparison(figures) for figures in by_metric.values())]
        for fault, by_metric in data["off_minus_on"].items()
    ]
    return "\n".join([*lines, evidence.markdown_table(["fault", "BLEU", "chrF"], rows)])


def main() -> int:
    parser = common.build_parser(
        "Plant faults in small real runs, with the guard on and off.", SMALL_CONFIG, common.RESULTS / "work" / NAME
    )
    parser.add_argument("--from-step", type=int, default=500, help="first executed step that is hit")
    parser.add_argument("--num-steps", type=int, default=200, help="length of the learning-rate fault")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at once")
    options = parser.parse_args()
    arms = build_arms(options)
    common.run_arms(list(arms.values()), options.jobs, options.threads_per_arm)
    data = collect_results(arms, options)
    return evidence.conclude(options.results, NAME, data, format_results(data))


if __name__ == "__main__":
    common.run_main(main)
