"""How fast does this project train a student, against trainers that a user would pick instead, on the same sentences?

The student starts from the same weights in this project and in Transformers' Seq2SeqTrainer; everybody sees the same
synthetic sentences, whose lengths are those of Multi30k, and orders them as it does by itself. Counted are real target
tokens, end marks included, per second of optimizer steps after some that warm up, and how much of what is computed is
no padding. With --teacher the student is distilled: the peer is a trainer that runs the teacher in every step, ours is
measured so and with the teacher's stored states, whose computation is timed apart.

    python -m benchmarks.training [--teacher spec_teacher] [--joeynmt /path/to/python]

Systems take turns, a process each; medians of the rounds are compared. Seq2SeqTrainer needs the extra `peers`. Joey
NMT, whose student has the same sizes, is run where --joeynmt names an interpreter that has it (in an environment of its
own: `pip install joeynmt importlib-metadata`); otherwise the table says that it was not.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import common, evidence
from benchmarks.machine import describe_machine, read_machine
from benchmarks.reliability.small_training import Content
from benchmarks.training_peers import check_joeynmt, run_joeynmt, run_trainer
from benchmarks.training_problem import (
    ALPHA,
    BETA,
    TEMPERATURE,
    Parts,
    Problem,
    Stopwatch,
    add_problem_options,
    find_budget,
    read_problem,
)
from cvm_translator.checkpoints.folder import LoadedCheckpoint
from cvm_translator.checkpoints.store import CheckpointStore, SavedCheckpoint, checkpoint_name
from cvm_translator.cli.memory import keep_freed_memory
from cvm_translator.config.model_presets import MODEL_PRESETS
from cvm_translator.config.schema import GuardConfig, ModelConfig, TrainingConfig
from cvm_translator.corpus.batches import BatchSchedule
from cvm_translator.losses import DistillationLoss
from cvm_translator.models.transformer import CvmTransformer
from cvm_translator.runs.events import EventWriter
from cvm_translator.runs.heartbeat import Heartbeat
from cvm_translator.teachers.states import TeacherStates
from cvm_translator.training.device import build_autocast
from cvm_translator.training.loop import TrainingLoop
from cvm_translator.training.objectives import DistillationObjective
from cvm_translator.training.setup import LoopSetup
from cvm_translator.training.signals import StopRequest
from cvm_translator.training.state import seed_everything
from cvm_translator.training.utilisation import StepCost, measure_peak

NAME = "training"
CPU = torch.device("cpu")
OURS, OURS_BUDGETED, OURS_STORED = "ours", "ours, batch_tokens", "ours, stored states"
AS_IT_COMES, TUNED = "Seq2SeqTrainer", "Seq2SeqTrainer, bf16, group_by_length"
JOEYNMT = "Joey NMT"
MIN_RATIOS = {AS_IT_COMES: 3.0, TUNED: 1.25, JOEYNMT: 3.0}
"""How many times the peer's tokens per second are promised, of our best way to make batches."""
MIN_DISTILLED_RATIO = 2.0
MULTI30K_PAIRS = 29_000
"""Size of its training set: how little batches pad depends on how many sentences there are to choose from."""


# ----------------------------------------------------------------------------------------------------------------- ours


class _StepWatch(Heartbeat):
    """The loop beats before each step; what was executed until then is counted by the setup's events."""

    def __init__(self, watch: Stopwatch, tokens: list[int]) -> None:
        super().__init__()
        self._watch, self._tokens = watch, tokens

    def beat(self, phase: str, **_: Any) -> None:
        if phase in ("step", "validation") and self._tokens:
            self._watch.mark(sum(self._tokens))


class _CountingEvents(EventWriter):
    """Remembers the token count and the loss of each step."""

    def __init__(self, path: Path, tokens: list[int], losses: list[float]) -> None:
        super().__init__(path)
        self._step_tokens, self._losses = tokens, losses

    def buffer(self, kind: str, **fields: Any) -> None:
        if kind == "train":
            self._step_tokens.append(fields["num_tokens"])
            self._losses.append(fields["loss"])
        super().buffer(kind, **fields)


class _Forgetful(CheckpointStore):
    """Keeps nothing: what is measured are steps."""

    def save(self, step: int, attempt: int, **_: Any) -> SavedCheckpoint:
        return SavedCheckpoint(self.directory / checkpoint_name(step, attempt), 0, 0.0)

    def load(self, checkpoint: str | Path) -> LoadedCheckpoint:
        path = self.directory / checkpoint
        return LoadedCheckpoint(path, int(path.name.removeprefix("checkpoint_")), 1, True, {}, {}, {})


def run_ours(
    parts: Parts,
    folder: Path,
    *,
    stored: type[TeacherStates] | TeacherStates | None = None,
    losses: list[float] | None = None,
    is_budgeted: bool = False,
    is_compiled: bool = False,
    device: torch.device = CPU,
) -> dict[str, float]:
    """The product's own loop, checkpoints and validations left out; each step's loss is added to `losses`. Freed memory
    is kept, as by the command line.

    `stored`: states of the teacher that are there, or how to make them. `is_budgeted`: batches of as many padded tokens
    as the wanted number of sentences has on average. `device`: where the models of `parts` are.
    """
    keep_freed_memory()
    problem, tokens = parts.problem, list[int]()
    watch = Stopwatch(problem.num_warm_up)
    figures: dict[str, float] = {}
    states = stored if isinstance(stored, TeacherStates) else None
    if isinstance(stored, type) and parts.teacher is not None:
        start = time.perf_counter()
        states = stored(folder, parts.teacher, "benchmark", parts.dataset)
        states.make(parts.teacher, partial(build_autocast, "bfloat16", device), lambda: None)
        figures["states_seconds"] = time.perf_counter() - start
    loss = DistillationLoss(TEMPERATURE, ALPHA if parts.teacher else 0.0, BETA if parts.teacher else 1.0)
    total = problem.num_steps + problem.num_warm_up
    budget = find_budget(parts.dataset.lengths, problem.batch_size) if is_budgeted else None
    settings = TrainingConfig(
        num_iterations=total,
        batch_size=problem.batch_size,
        batch_tokens=budget,
        warmup_steps=1,
        learning_rate=1e-4,
        checkpoint_every_steps=10 * total,
    )
    batches = BatchSchedule(parts.dataset.lengths, problem.batch_size, seed=5, batch_tokens=budget)
    cost = StepCost(parts.student, parts.teacher, states is not None, measure_peak(settings.precision, device))
    seed_everything(7)
    with _CountingEvents(folder / "events.jsonl", tokens, [] if losses is None else losses) as events:
        loop = TrainingLoop(
            LoopSetup(
                stage="distil",
                settings=settings,
                guard=GuardConfig(),
                model=parts.student,
                objective=DistillationObjective(parts.student, loss, parts.teacher, states),
                dataset=parts.dataset,
                batches=batches,
                read_stored=None if states is None else states.read,
                store=_Forgetful(folder / "checkpoints", 2, report=lambda _: None),
                events=events,
                judge=Content(),
                stop=StopRequest(),
                device=device,
                is_compiled=is_compiled,
                validate_every_steps=10 * total,
                heartbeat=_StepWatch(watch, tokens),
                cost=cost,
            )
        )
        loop.run()
    figures["tokens_per_second"] = watch.rate()
    figures["padding_efficiency"] = batches.padding_efficiency()
    if cost.peak is not None:
        batch = parts.dataset.batch(np.arange(problem.batch_size))
        figures["utilisation"] = cost.count(batch) / batch.num_tokens * figures["tokens_per_second"] / cost.peak
    return figures


# -------------------------------------------------------------------------------------------------------------- program


SYSTEMS: dict[str, Callable[[Parts, Path], dict[str, float]]] = {
    OURS: run_ours,
    OURS_BUDGETED: lambda parts, folder: run_ours(parts, folder, is_budgeted=True),
    OURS_STORED: lambda parts, folder: run_ours(parts, folder, stored=TeacherStates),
    AS_IT_COMES: lambda parts, folder: run_trainer(parts, folder, is_tuned=False),
    TUNED: lambda parts, folder: run_trainer(parts, folder, is_tuned=True),
}


def run_worker(name: str, problem: Problem, joeynmt: Path | None = None) -> dict[str, float]:
    parts = Parts.build(problem)
    with tempfile.TemporaryDirectory() as folder:
        if name == JOEYNMT:
            assert joeynmt is not None
            return run_joeynmt(parts, Path(folder), joeynmt)
        return SYSTEMS[name](parts, Path(folder))


def find_best(has_teacher: bool) -> str:
    """Which of our systems is compared."""
    return OURS_STORED if has_teacher else OURS_BUDGETED


def check(systems: dict[str, dict[str, float]], has_teacher: bool) -> dict[str, list[str]]:
    ours = systems[find_best(has_teacher)]["tokens_per_second"]
    promised = {TUNED: MIN_DISTILLED_RATIO} if has_teacher else MIN_RATIOS
    found: dict[str, list[str]] = {}
    for name, ratio in promised.items():
        if name in systems:
            actual = ours / systems[name]["tokens_per_second"]
            found[f"at least {ratio:g} times {name}"] = [] if actual >= ratio else [f"{actual:.2f} times"]
    return found


def format_results(data: dict[str, Any]) -> str:
    problem, systems = data["problem"], data["systems"]
    own = [OURS, find_best(bool(problem["teacher"]))]
    rows = [
        [
            name,
            f"{figures['tokens_per_second']:,.0f}",
            *(f"{systems[mine]['tokens_per_second'] / figures['tokens_per_second']:.2f}" for mine in own),
            f"{figures['padding_efficiency']:.1%}",
            f"{figures['utilisation']:.0%}" if "utilisation" in figures else "-",
        ]
        for name, figures in systems.items()
    ]
    if JOEYNMT not in systems and not problem["teacher"]:
        rows.append([JOEYNMT, "not run", "-", "-", "-", "-"])
    stored = systems.get(OURS_STORED, {}).get("states_seconds")
    return "\n".join(
        [
            "# Training with a teacher" if problem["teacher"] else "# Training",
            "",
            *evidence.describe_checks(data["failures"]),
            "",
            f"Student {problem['student']} ({data['num_parameters']:,} parameters, vocabulary"
            f" {problem['vocabulary']:,}), teacher {problem['teacher'] or 'none'}; {problem['batch_size']} sentences a"
            f" step, {problem['num_steps']} steps after {problem['num_warm_up']}, of {data['num_pairs']:,} pairs;"
            f" {data['threads']} threads, medians of {data['rounds']} rounds."
            + (f" The stored states took {stored:.0f} s for all sentences, once." if stored else ""),
            "",
            describe_machine(data["machine"]),
            "",
            evidence.markdown_table(
                ["system", "target tokens/s", *(f"{mine} is times" for mine in own), "not padding", "of the peak"], rows
            ),
        ]
    )


def main() -> int:
    parser = common.build_plain_parser("Compare training with other trainers.")
    parser.add_argument("--teacher", choices=MODEL_PRESETS, help="distil from a teacher of these sizes")
    parser.add_argument("--joeynmt", type=Path, metavar="PYTHON", help="an interpreter that has Joey NMT")
    add_problem_options(parser)
    common.add_turn_options(parser)
    options = parser.parse_args()
    if options.teacher is None and options.num_pairs is None:
        options.num_pairs = MULTI30K_PAIRS
    problem = read_problem(options)
    if options.worker:
        print(json.dumps(run_worker(options.worker, problem, options.joeynmt)))
        return 0
    common.check_peers("transformers", "accelerate")
    joeynmt = options.joeynmt and options.joeynmt.absolute()
    names = [name for name in SYSTEMS if name != (OURS_BUDGETED if options.teacher else OURS_STORED)]
    if joeynmt and options.teacher is None:
        check_joeynmt(joeynmt)
        names.append(JOEYNMT)
    turns = common.Turns("benchmarks.training", names, asdict(problem) | {"joeynmt": joeynmt}, options)
    machine = read_machine("transformers", "accelerate")
    systems = turns.measure()
    data = {
        "machine": machine,
        "problem": asdict(problem),
        "num_parameters": CvmTransformer(
            ModelConfig.model_validate(options.student), options.vocabulary
        ).num_parameters(),
        "num_pairs": problem.count_pairs(),
        "threads": options.threads,
        "rounds": options.rounds,
        "systems": systems,
        "failures": check(systems, options.teacher is not None),
    }
    name = NAME if options.teacher is None else f"{NAME}_distilled"
    code = evidence.conclude(options.results, name, data, format_results(data))
    turns.forget()
    return code


if __name__ == "__main__":
    common.run_main(main)
