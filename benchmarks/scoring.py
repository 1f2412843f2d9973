"""What do a validation's scores cost the training: computed between two steps, and by a process beside it?

A finished run lends its student, its training pairs and what its validations said. Arms: training and scoring by turns
on all cores, as is the default on a CPU; the same on all cores but one; and training on all but one while the scoring
process takes the last one. An arm trains the steps that lie between a validation and its verdict, a tenth of the
distance between two validations, with the scores of one validation to be computed meanwhile or before.

    python -m benchmarks.scoring --run distillation_output

Arms take turns, a process each; medians of the rounds are compared.
"""

from __future__ import annotations

import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import common, evidence
from benchmarks.common import BenchmarkError
from benchmarks.machine import describe_machine, read_machine
from cvm_translator.cli.memory import keep_freed_memory
from cvm_translator.config import load_config
from cvm_translator.config.schema import TrainingConfig
from cvm_translator.corpus.build import load_split
from cvm_translator.corpus.dataset import DistillationDataset
from cvm_translator.losses import DistillationLoss
from cvm_translator.models.folder import load_model
from cvm_translator.training.late import count_steps_to_verdict
from cvm_translator.training.objectives import DistillationObjective
from cvm_translator.training.optimizer import build_optimizer
from cvm_translator.training.spikes import SpikeWindow
from cvm_translator.training.step import train_step
from cvm_translator.validation import DistillationValidator, ValidationConfig
from cvm_translator.validation.files import read_hypotheses
from cvm_translator.validation.scoring import ScoringProcess

NAME = "scoring"
ALL, FEWER, BESIDE = "all cores, scores between steps", "one core less, scores between steps", "one core less, beside"
ARMS = (ALL, FEWER, BESIDE)
MAX_COST = 0.5
"""Of what the scores cost between the steps of as many cores."""


def read_spoken(run: Path) -> list[list[str]]:
    """What the run's validations said, by step; the last three."""
    paths = (run / "validation").glob("step_*.hypotheses.txt")
    spoken = sorted(paths, key=lambda path: int(path.name.split(".")[0].removeprefix("step_")))[-3:]
    if len(spoken) < 2:
        raise BenchmarkError(f"--run {run} has validated {len(spoken)} times: name a run with two validations or more")
    return [read_hypotheses(path) for path in spoken]


def run_worker(name: str, run: Path, num_steps: int, num_cores: int) -> dict[str, float]:
    """Seconds of the steps alone, and of the steps with one validation's scores."""
    keep_freed_memory()
    torch.set_num_threads(num_cores if name == ALL else num_cores - 1)
    layout = common.find_student(run)
    config = load_config(layout.config)
    folder = load_model(layout.student / "float", "cpu")
    student, tokenizer = folder.model, folder.tokenizer
    batch_size = config.distillation.batch_size
    pairs = [pair for pair, _ in zip(load_split(layout.corpus, "train"), range(num_steps * batch_size), strict=False)]
    dataset = DistillationDataset.from_pairs(pairs, tokenizer, config.student.model.max_length)
    order = dataset.lengths[:, 1].argsort(kind="stable")
    batches = [dataset.batch(order[at : at + batch_size]) for at in range(0, len(order), batch_size)]
    settings = TrainingConfig(num_iterations=1000, batch_size=batch_size)
    objective = DistillationObjective(student, DistillationLoss(temperature=1.0, alpha=0.0, beta=1.0))
    optimizer, spikes = build_optimizer(student, settings), SpikeWindow(num_steps=1000, threshold=math.inf)
    held_out, spoken = list(load_split(layout.corpus, "validation")), read_spoken(run)
    sources, references = [pair.source for pair in held_out], [pair.target for pair in held_out]
    validation = ValidationConfig.from_run(config)

    def train() -> None:
        student.train()
        for number in range(num_steps):
            train_step(
                student, objective, optimizer, batches[number % len(batches)], settings, spikes, learning_rate=1e-5
            )

    with tempfile.TemporaryDirectory() as scratch:
        validator = DistillationValidator(validation, Path(scratch), sources, references)
        scoring = ScoringProcess(validation, sources, references, num_threads=1)

        def train_and_score(hypotheses: list[str]) -> None:
            if name == BESIDE:
                scoring.submit(hypotheses)
                train()
                scoring.collect(lambda: None)
            else:
                validator.score(hypotheses)
                train()

        try:
            train_and_score(spoken[0])  # starts the process, and has the references encoded
            seconds = {"alone": [measure_seconds(train)], "scored": []}
            for hypotheses in spoken[1:]:
                seconds["scored"].append(measure_seconds(partial(train_and_score, hypotheses)))
                seconds["alone"].append(measure_seconds(train))
        finally:
            scoring.close()
    return {key: statistics.median(values) for key, values in seconds.items()}


def measure_seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def check(arms: Mapping[str, Mapping[str, float]]) -> dict[str, list[str]]:
    between, beside = (arms[name]["scored"] - arms[name]["alone"] for name in (FEWER, BESIDE))
    claim = f"beside training, scores cost it at most {MAX_COST:g} of what they cost between its steps"
    return {claim: [] if beside <= MAX_COST * between else [f"{beside:.1f} of {between:.1f} s"]}


def format_results(data: dict[str, Any]) -> str:
    rows = [
        [
            name,
            f"{seconds['alone']:.1f}",
            f"{seconds['scored']:.1f}",
            f"{seconds['scored'] - seconds['alone']:.1f}",
        ]
        for name, seconds in data["arms"].items()
    ]
    return "\n".join(
        [
            "# Scores beside training",
            "",
            *evidence.describe_checks(data["failures"]),
            "",
            f"{data['num_steps']} steps of the student of {data['run']}, and one validation of"
            f" {data['num_sentences']:,} sentences ({', '.join(data['metrics'])}) to be scored. Medians of"
            f" {data['rounds']} rounds.",
            "",
            describe_machine(data["machine"]),
            "",
            evidence.markdown_table(["training on", "steps alone s", "with the scores s", "scores cost s"], rows),
        ]
    )


def main() -> int:
    parser = common.build_plain_parser("Compare scores computed between steps and beside them.")
    parser.add_argument("--run", type=Path, required=True, help="folder of a finished run")
    parser.add_argument("--num-steps", type=int, help="default: from the run's cadence")
    common.add_turn_options(parser)
    options = parser.parse_args()
    layout = common.find_student(options.run)
    config = load_config(layout.config)
    num_steps = options.num_steps or count_steps_to_verdict(config.validation.every_steps)
    if options.worker:
        print(json.dumps(run_worker(options.worker, options.run, num_steps, options.threads)))
        return 0
    if options.threads < 2:
        raise BenchmarkError(f"--threads {options.threads}: scoring beside training takes two cores or more")
    problem = {"run": str(options.run.resolve()), "num_steps": num_steps, "threads": options.threads}
    turns = common.Turns("benchmarks.scoring", ARMS, problem, options)
    data: dict[str, Any] = {"machine": read_machine(), "run": options.run.name, "num_steps": num_steps}
    data |= {"num_sentences": len(read_spoken(options.run)[0]), "metrics": list(config.validation.metrics)}
    data |= {"rounds": options.rounds, "arms": turns.measure()}
    data["failures"] = check(data["arms"])
    code = evidence.conclude(options.results, NAME, data, format_results(data))
    turns.forget()
    return code


if __name__ == "__main__":
    common.run_main(main)
