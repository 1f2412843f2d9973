"""Does distillation pay? A config's student against the same student, with the same start, trained without the teacher.

Both systems run for the same iterations, with the same batches, guard, quantisation and validations; the one without
the teacher has alpha 0 and beta 1. The learning rate of each is tuned with as many trials, on the validation set and
the first seed (shortened with --trial-iterations); the arms of all seeds use the best. The delivered int8 students are
compared on the test set, which no decision has seen, by a paired bootstrap over sentences: for each seed, and over all
seeds together (statistics summed over seeds, the same resampled sentences). One cached teacher, one corpus split and
one tokenizer serve all arms.

    python -m benchmarks.distillation_gain [--jobs 2] [--dry-run]

It can be killed and started again at any time: what is done is kept, what was begun is resumed.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import common, evidence
from benchmarks.common import Arm, BenchmarkError

SYSTEMS: dict[str, tuple[str, ...]] = {
    "distilled": (),
    "no_teacher": ("distillation.alpha=0.0", "distillation.beta=1.0"),
}
NAME = "distillation_gain"
INSUFFICIENT = "not significant at the 5 % level"


@dataclass(frozen=True)
class Plan:
    """Which arms there are; the later seeds' learning rates are known once the trials are done."""

    config: Path
    work: Path
    settings: tuple[str, ...]
    learning_rates: tuple[float, ...]
    seeds: tuple[int, ...]
    trial_iterations: int | None = None
    """Length of a trial; None: trials are whole arms."""

    def arm(self, system: str, learning_rate: float, seed: int) -> Arm:
        name = f"{system}_lr{learning_rate:g}_seed{seed}"
        own = (*SYSTEMS[system], f"distillation.learning_rate={learning_rate!r}", f"seed={seed}")
        return Arm(name, self.config, (*self.settings, *own), self.work / name)

    def trial(self, system: str, learning_rate: float) -> Arm:
        arm = self.arm(system, learning_rate, self.seeds[0])
        if self.trial_iterations is None:
            return arm
        short = (f"distillation.num_iterations={self.trial_iterations}", "validation.metrics=[bleu, chrf]")
        name = f"trial_{arm.name}"
        return Arm(name, arm.config, (*arm.settings, *short), self.work / name)

    def trials(self, system: str) -> list[Arm]:
        return [self.trial(system, learning_rate) for learning_rate in self.learning_rates]

    def best_learning_rate(self, system: str) -> float | None:
        """That of the trial with the best validation quality; None until all trials are done."""
        trials = dict(zip(self.learning_rates, self.trials(system), strict=True))
        if not all(arm.is_done() for arm in trials.values()):
            return None
        return max(trials, key=lambda learning_rate: evidence.best_validation_quality(trials[learning_rate]))

    def winners(self, system: str) -> list[Arm]:
        """The arms with the chosen learning rate, a seed each; none until it is chosen."""
        best = self.best_learning_rate(system)
        return [] if best is None else [self.arm(system, best, seed) for seed in self.seeds]

    def all_arms(self) -> list[Arm]:
        """Trials of the systems in turn, then the later seeds that are known by now."""
        trials = [arm for pair in zip(*map(self.trials, SYSTEMS), strict=True) for arm in pair]
        later = [arm for seeds in zip(*map(self.winners, SYSTEMS), strict=False) for arm in seeds]
        return list(dict.fromkeys([*trials, *later]))


# ------------------------------------------------------------------------------------------------------------- results


def collect_results(plan: Plan, options: Namespace) -> dict[str, Any]:
    """Everything known by now, as JSON-compatible data."""
    done = [arm for arm in plan.all_arms() if arm.is_done()]
    config = plan.arm("distilled", plan.learning_rates[0], plan.seeds[0]).load_config()
    data: dict[str, Any] = {
        "config": options.config.name,
        "settings": list(options.set),
        "num_iterations": config.distillation.num_iterations,
        "temperature": config.distillation.temperature,
        "alpha": config.distillation.alpha,
        "beta": config.distillation.beta,
        "learning_rates": list(plan.learning_rates),
        "seeds": list(plan.seeds),
        "trial_iterations": plan.trial_iterations,
        "num_arms": len(SYSTEMS) * (len(plan.learning_rates) + len(plan.seeds) - (plan.trial_iterations is None)),
        "num_done": len(done),
        "chosen_learning_rates": {system: plan.best_learning_rate(system) for system in SYSTEMS},
        "setting": evidence.describe_setting(done[0]) if done else {},
        "arms": {arm.name: _describe_arm(plan, arm) | evidence.summarise(arm) for arm in done},
        "comparisons": {},
    }
    pairs = list(zip(plan.winners("no_teacher"), plan.winners("distilled"), strict=False))
    for seed, pair in zip(plan.seeds, pairs, strict=False):
        if all(arm.is_done() for arm in pair):
            compared = evidence.compare_arms([pair[0]], [pair[1]])
            data["comparisons"][f"seed {seed}"] = evidence.plain_comparisons(compared)
    if pairs and all(arm.is_done() for pair in pairs for arm in pair):
        without, distilled = zip(*pairs, strict=True)
        data["comparisons"]["all seeds"] = evidence.plain_comparisons(evidence.compare_arms(without, distilled))
    return data


def _describe_arm(plan: Plan, arm: Arm) -> dict[str, Any]:
    config = arm.load_config()
    return {
        "system": next(system for system in SYSTEMS if arm.name.removeprefix("trial_").startswith(system)),
        "num_iterations": config.distillation.num_iterations,
        "learning_rate": config.distillation.learning_rate,
        "seed": config.seed,
    }


def describe_verdict(data: Mapping[str, Any]) -> str:
    """What the numbers allow to say, in one paragraph."""
    pooled = data["comparisons"].get("all seeds")
    if pooled is None:
        return f"Incomplete: {data['num_done']} of {data['num_arms']} arms are done, so nothing is concluded yet."
    sentences = []
    for name, figures in pooled.items():
        change = f"{'BLEU' if name == 'bleu' else 'chrF'} {evidence.describe_comparison(figures)}"
        if figures["p_value"] >= evidence.SIGNIFICANCE:
            sentences.append(f"{change}: {INSUFFICIENT}; distillation is not shown to make a difference.")
        elif figures["difference"] > 0:
            sentences.append(f"{change}: the distilled student is significantly better.")
        else:
            sentences.append(f"{change}: the student trained without the teacher is significantly better.")
    for system, learning_rate in data["chosen_learning_rates"].items():
        rates = data["learning_rates"]
        if len(rates) > 1 and learning_rate in (min(rates), max(rates)):
            sentences.append(
                f"The best learning rate of {system}, {learning_rate:g}, is at the edge of what was tried:"
                " a value beyond it might do better."
            )
    return f"Distilled minus no teacher, over {len(data['seeds'])} seeds: " + " ".join(sentences)


def format_results(data: Mapping[str, Any]) -> str:
    """The tables and the verdict as Markdown."""
    lines = [f"# Distillation gain: {data['config']}", "", describe_verdict(data)]
    if data["setting"]:
        teacher, student = data["setting"]["teacher"], data["setting"]["student"]
        lines += [
            "",
            f"Teacher: {teacher['bleu']:.2f} BLEU, {teacher['chrf']:.2f} chrF on the test set"
            f" ({data['setting']['corpus']['test']:,} sentences), {teacher['num_parameters']:,} parameters."
            f" Student: {student['num_parameters']:,} parameters, int8 weights"
            f" {student['num_bytes'] / teacher['num_bytes']:.3f} of the teacher's float32 bytes."
            f" {data['num_iterations']:,} iterations; distilled: temperature {data['temperature']:g},"
            f" alpha {data['alpha']:g}, beta {data['beta']:g}; no_teacher: alpha 0, beta 1. Both start from the same"
            " weights. Scores are those of the int8 student on the test set; quality is relative to the teacher (1)."
            " The learning rate (*: chosen) is the one with the best quality on validation.",
        ]
    rows = []
    for arm in data["arms"].values():
        is_chosen = arm["learning_rate"] == data["chosen_learning_rates"][arm["system"]]
        rows.append(
            [
                arm["system"] + (" (trial)" if arm["num_iterations"] < data["num_iterations"] else ""),
                f"{arm['learning_rate']:g}{'*' if is_chosen else ''}",
                arm["seed"],
                f"{arm['bleu']:.2f}",
                f"{arm['chrf']:.2f}",
                f"{arm['quality_score']:.3f}",
                "-" if arm["bleu_retention"] is None else f"{arm['bleu_retention']:.1%}",
                f"{arm['best_validation_quality']:.4f}",
                arm["best_step"],
                f"{arm['seconds']:.0f}",
            ]
        )
    header = ["arm", "learning rate", "seed", "BLEU", "chrF", "quality", "BLEU retention"]
    header += ["quality on validation", "best step", "seconds"]
    lines += ["", evidence.markdown_table(header, rows)]
    if data["comparisons"]:
        rows = [
            [name, *(evidence.describe_comparison(figures) for figures in compared.values())]
            for name, compared in data["comparisons"].items()
        ]
        lines += ["", "Distilled minus no_teacher, with 95 % interval (paired bootstrap over test sentences,"]
        lines += [f"{evidence.NUM_DRAWS:,} draws, two-sided p):", ""]
        lines += [evidence.markdown_table(["", "BLEU", "chrF"], rows)]
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------------------- program


def build_plan(options: Namespace) -> Plan:
    work = options.work.resolve()
    settings = [f"teacher.cache_dir={work / 'teachers'}", f"num_threads={options.threads_per_arm}"]
    if options.teacher is not None:
        settings += ["teacher.kind=checkpoint", f"teacher.path={options.teacher.resolve()}"]
    try:
        rates = tuple(float(part) for part in options.learning_rates.split(","))
        seeds = tuple(int(part) for part in options.seeds.split(","))
    except ValueError as error:
        raise BenchmarkError(f"--learning-rates and --seeds are numbers with commas between them: {error}") from None
    return Plan(options.config.resolve(), work, (*settings, *options.set), rates, seeds, options.trial_iterations)


def main() -> int:
    parser = common.build_parser(
        "Compare the student of a config with the same student trained without the teacher.",
        common.REPOSITORY / "configs" / "cvm_small.yaml",
        common.RESULTS / "work" / NAME,
    )
    parser.add_argument("--seeds", default="13,14,15", metavar="A,B,…", help="the first one tunes the learning rate")
    parser.add_argument("--learning-rates", default="1e-3,2e-3,4e-3", metavar="A,B,…", help="trials of each system")
    parser.add_argument("--trial-iterations", type=int, default=2000, metavar="N", help="length of a trial")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="arms that run at once")
    parser.add_argument("--teacher", type=Path, metavar="DIR", help="model folder of a trained teacher to use")
    parser.add_argument("--dry-run", action="store_true", help="list the arms and what is done")
    options = parser.parse_args()
    plan = build_plan(options)
    if options.dry_run:
        _list_arms(plan)
        return 0

    def save(_: Arm | None = None) -> None:
        data = collect_results(plan, options)
        evidence.write_results(options.results, NAME, data, format_results(data))

    # The first call runs the trials; only then are the arms of the later seeds known.
    for _ in range(2):
        common.run_arms(plan.all_arms(), options.jobs, options.threads_per_arm, save)
    save()
    print((options.results / f"{NAME}.md").read_text(encoding="utf-8"))
    return 0


def _list_arms(plan: Plan) -> None:
    rows = [[arm.name, arm.describe_state()] for arm in plan.all_arms()]
    for system in SYSTEMS:
        if plan.best_learning_rate(system) is None:
            rows += [[f"{system}, seed {seed}", "waits for the trials"] for seed in plan.seeds[1:]]
    print(evidence.markdown_table(["arm", "state"], rows))


if __name__ == "__main__":
    common.run_main(main)
