"""How fast does this project train a student, against Transformers' Seq2SeqTrainer on the same model and sentences?

The student starts from the same weights everywhere and sees the same synthetic sentences, whose lengths are those of
Multi30k; each system orders them as it does by itself. Counted are real target tokens, end marks included, per second
of optimizer steps after some that warm up. With --teacher the student is distilled: the peer is a trainer that runs the
teacher in every step, ours is measured so and with the teacher's stored states, whose computation is timed apart.

    python -m benchmarks.training [--teacher spec_teacher]

Systems take turns, a process each; medians of the rounds are compared. Seq2SeqTrainer needs the extra `peers`.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks import common, evidence
from benchmarks.common import BenchmarkError
from benchmarks.reliability.small_training import Content
from cvm_translator.checkpoints.store import CheckpointStore
from cvm_translator.config.model_presets import MODEL_PRESETS
from cvm_translator.config.schema import GuardConfig, ModelConfig, TrainingConfig
from cvm_translator.corpus.batches import BatchSchedule
from cvm_translator.corpus.dataset import DistillationDataset
from cvm_translator.errors import import_optional
from cvm_translator.losses import DistillationLoss
from cvm_translator.models.huggingface import to_m2m100
from cvm_translator.models.initialization import init_random
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
MEAN_LENGTH, LENGTH_DEVIATION, LONGEST = 15.0, 5.0, 45
"""Pieces a sentence, as Multi30k has them with a vocabulary of 10,000."""
TEMPERATURE, ALPHA, BETA = 2.0, 0.8, 0.2
IGNORED = -100
OURS, OURS_STORED = "ours", "ours, stored states"
AS_IT_COMES, TUNED = "Seq2SeqTrainer", "Seq2SeqTrainer, bf16, group_by_length"
MIN_RATIOS = {AS_IT_COMES: 3.0, TUNED: 1.25}
"""How many times the peer's tokens per second are promised."""
MIN_DISTILLED_RATIO = 2.0


@dataclass(frozen=True)
class Problem:
    """What is trained, and for how long."""

    student: str
    teacher: str | None
    vocabulary: int
    batch_size: int
    num_steps: int
    num_warm_up: int


@dataclass
class Parts:
    """The same for every system."""

    problem: Problem
    student: CvmTransformer
    teacher: CvmTransformer | None
    dataset: DistillationDataset

    @classmethod
    def build(cls, problem: Problem) -> Parts:
        generator = np.random.default_rng(13)
        count = problem.batch_size * (problem.num_steps + problem.num_warm_up)
        lengths = np.clip(generator.normal(MEAN_LENGTH, LENGTH_DEVIATION, (count, 2)), 3, LONGEST).astype(int)
        sources, targets = ([generator.integers(4, problem.vocabulary, n).tolist() for n in side] for side in lengths.T)
        student = _build_model(problem.student, problem.vocabulary, seed=1)
        teacher = _build_model(problem.teacher, problem.vocabulary, seed=2) if problem.teacher else None
        return cls(problem, student, teacher, DistillationDataset(sources, targets))


def _build_model(preset: str, vocabulary: int, seed: int) -> CvmTransformer:
    model = CvmTransformer(ModelConfig.model_validate(preset), vocabulary)
    init_random(model, seed)
    return model


class Stopwatch:
    """Real target tokens per second between the end of the warm-up and the last step."""

    def __init__(self, num_warm_up: int) -> None:
        self._num_warm_up = num_warm_up
        self._marks: list[tuple[float, int]] = []

    def mark(self, num_tokens_so_far: int) -> None:
        """After each step."""
        self._marks.append((time.perf_counter(), num_tokens_so_far))

    def rate(self) -> float:
        (begin, before), (end, after) = self._marks[self._num_warm_up - 1], self._marks[-1]
        return (after - before) / (end - begin)


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


def run_ours(
    parts: Parts, folder: Path, *, has_stored_states: bool, losses: list[float] | None = None
) -> dict[str, float]:
    """The product's own loop, checkpoints and validations left out; each step's loss is added to `losses`."""
    problem, tokens = parts.problem, list[int]()
    watch = Stopwatch(problem.num_warm_up)
    figures: dict[str, float] = {}
    states: TeacherStates | None = None
    if has_stored_states and parts.teacher is not None:
        start = time.perf_counter()
        states = TeacherStates(folder, parts.teacher, "benchmark", parts.dataset)
        states.make(parts.teacher, partial(build_autocast, "bfloat16", torch.device("cpu")), lambda: None)
        figures["states_seconds"] = time.perf_counter() - start
    loss = DistillationLoss(TEMPERATURE, ALPHA if parts.teacher else 0.0, BETA if parts.teacher else 1.0)
    total = problem.num_steps + problem.num_warm_up
    settings = TrainingConfig(
        num_iterations=total,
        batch_size=problem.batch_size,
        warmup_steps=1,
        learning_rate=1e-4,
        checkpoint_every_steps=10 * total,
    )
    device = torch.device("cpu")
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
                batches=BatchSchedule(parts.dataset.lengths, problem.batch_size, seed=5),
                store=CheckpointStore(folder / "checkpoints", 2, report=lambda _: None),
                events=events,
                judge=Content(),
                stop=StopRequest(),
                device=device,
                validate_every_steps=10 * total,
                heartbeat=_StepWatch(watch, tokens),
                cost=cost,
            )
        )
        loop.run()
    figures["tokens_per_second"] = watch.rate()
    if cost.peak is not None:
        batch = parts.dataset.batch(np.arange(problem.batch_size))
        figures["utilisation"] = cost.count(batch) / batch.num_tokens * figures["tokens_per_second"] / cost.peak
    return figures


# ----------------------------------------------------------------------------------------------------------- their side


def run_theirs(parts: Parts, folder: Path, *, is_tuned: bool) -> dict[str, float]:
    """Seq2SeqTrainer, with the teacher in each step where there is one."""
    transformers = import_optional("transformers", "peers")
    import_optional("accelerate", "peers")
    problem, watch = parts.problem, Stopwatch(parts.problem.num_warm_up)
    counted = [0]

    def collate(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        """Padded tensors; the counting of real target tokens costs nothing worth measuring."""

        def pad(name: str, value: int) -> torch.Tensor:
            tensors = [torch.tensor(row[name]) for row in rows]
            return nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value)

        source, labels = pad("input_ids", 1), pad("labels", IGNORED)
        return {"input_ids": source, "attention_mask": (source != 1).long(), "labels": labels}

    class Callback(transformers.TrainerCallback):  # type: ignore[name-defined]
        def on_step_end(self, *_: Any, **__: Any) -> None:
            watch.mark(counted[0])

    class Trainer(transformers.Seq2SeqTrainer):  # type: ignore[name-defined]
        def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            counted[0] += int((inputs["labels"] != IGNORED).sum())
            return super().training_step(model, inputs, *args, **kwargs)

        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
            if teacher is None:
                return super().compute_loss(model, inputs, return_outputs, **kwargs)
            outputs = model(**inputs)
            real = inputs["labels"] != IGNORED
            shifted = nn.functional.pad(inputs["labels"].masked_fill(~real, 1)[:, :-1], (1, 0), value=2)
            with torch.no_grad():  # without labels, so that the teacher computes no loss
                sources = {name: inputs[name] for name in ("input_ids", "attention_mask")}
                wanted = teacher(**sources, decoder_input_ids=shifted, use_cache=False).logits
            divergence = nn.functional.kl_div(
                (outputs.logits[real].float() / TEMPERATURE).log_softmax(-1),
                (wanted[real].float() / TEMPERATURE).log_softmax(-1),
                reduction="batchmean",
                log_target=True,
            )
            return ALPHA * TEMPERATURE**2 * divergence + BETA * outputs.loss

    def convert(model: CvmTransformer) -> Any:
        sizes, weights = to_m2m100(model)
        converted = transformers.M2M100ForConditionalGeneration(transformers.M2M100Config(**sizes))
        converted.load_state_dict(weights, strict=False)
        return converted

    teacher = convert(parts.teacher).eval().requires_grad_(False) if parts.teacher is not None else None
    pairs = (parts.dataset[index] for index in range(len(parts.dataset)))
    rows = [{"input_ids": [*source.tolist(), 2], "labels": [*target.tolist(), 2]} for source, target in pairs]
    tuned = {"bf16": True, "train_sampling_strategy": "group_by_length"} if is_tuned else {}
    arguments = transformers.Seq2SeqTrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=problem.batch_size,
        max_steps=problem.num_steps + problem.num_warm_up,
        learning_rate=1e-4,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        remove_unused_columns=False,
        logging_strategy="no",
        **tuned,
    )
    trainer = Trainer(
        model=convert(parts.student), args=arguments, train_dataset=rows, data_collator=collate, callbacks=[Callback()]
    )
    trainer.train()
    return {"tokens_per_second": watch.rate()}


SYSTEMS: dict[str, Callable[[Parts, Path], dict[str, float]]] = {
    OURS: lambda parts, folder: run_ours(parts, folder, has_stored_states=False),
    OURS_STORED: lambda parts, folder: run_ours(parts, folder, has_stored_states=True),
    AS_IT_COMES: lambda parts, folder: run_theirs(parts, folder, is_tuned=False),
    TUNED: lambda parts, folder: run_theirs(parts, folder, is_tuned=True),
}


# -------------------------------------------------------------------------------------------------------------- program


def run_worker(name: str, problem: Problem) -> dict[str, float]:
    parts = Parts.build(problem)
    with tempfile.TemporaryDirectory() as folder:
        return SYSTEMS[name](parts, Path(folder))


def check(systems: dict[str, dict[str, float]], has_teacher: bool) -> dict[str, list[str]]:
    ours = systems[OURS_STORED if has_teacher else OURS]["tokens_per_second"]
    promised = {TUNED: MIN_DISTILLED_RATIO} if has_teacher else MIN_RATIOS
    found: dict[str, list[str]] = {}
    for name, ratio in promised.items():
        if name in systems:
            actual = ours / systems[name]["tokens_per_second"]
            found[f"at least {ratio:g} times {name}"] = [] if actual >= ratio else [f"{actual:.2f} times"]
    return found


def format_results(data: dict[str, Any]) -> str:
    problem, systems = data["problem"], data["systems"]
    ours = systems[OURS_STORED if problem["teacher"] else OURS]["tokens_per_second"]
    rows = [
        [
            name,
            f"{figures['tokens_per_second']:,.0f}",
            f"{ours / figures['tokens_per_second']:.2f}",
            f"{figures['utilisation']:.0%}" if "utilisation" in figures else "-",
        ]
        for name, figures in systems.items()
    ]
    stored = systems.get(OURS_STORED, {}).get("states_seconds")
    return "\n".join(
        [
            "# Training",
            "",
            *evidence.describe_checks(data["failures"]),
            "",
            f"Student {problem['student']} ({data['num_parameters']:,} parameters, vocabulary"
            f" {problem['vocabulary']:,}), teacher {problem['teacher'] or 'none'}; {problem['batch_size']} sentences a"
            f" step, {problem['num_steps']} steps after {problem['num_warm_up']}; {data['threads']}"
            f" threads, medians of {data['rounds']} rounds."
            + (f" The stored states took {stored:.0f} s for all sentences, once." if stored else ""),
            "",
            evidence.markdown_table(["system", "target tokens/s", "ours is times", "of the measured peak"], rows),
        ]
    )


def add_problem_options(parser: argparse.ArgumentParser) -> None:
    """The sizes of the problem, but for the teacher, which each program has its own default for."""
    parser.add_argument("--student", choices=MODEL_PRESETS, default="spec_student")
    parser.add_argument("--vocabulary", type=int, default=32_000, metavar="V")
    parser.add_argument("--batch-size", type=int, default=32, metavar="N")
    parser.add_argument("--num-steps", type=int, default=20, metavar="N")
    parser.add_argument("--num-warm-up", type=int, default=3, metavar="N")


def read_problem(options: argparse.Namespace) -> Problem:
    if options.num_warm_up < 1 or options.num_steps < 1:
        raise BenchmarkError("--num-steps and --num-warm-up are at least 1")
    return Problem(**{field.name: getattr(options, field.name) for field in fields(Problem)})


def main() -> int:
    parser = common.build_plain_parser("Compare training with Transformers' Seq2SeqTrainer.")
    parser.add_argument("--teacher", choices=MODEL_PRESETS, help="distil from a teacher of these sizes")
    add_problem_options(parser)
    common.add_turn_options(parser)
    options = parser.parse_args()
    problem = read_problem(options)
    if options.worker:
        print(json.dumps(run_worker(options.worker, problem)))
        return 0
    names = [name for name in SYSTEMS if options.teacher or name != OURS_STORED]
    systems = common.measure_in_turns("benchmarks.training", names, asdict(problem), options.threads, options.rounds)
    data = {
        "problem": asdict(problem),
        "num_parameters": CvmTransformer(
            ModelConfig.model_validate(options.student), options.vocabulary
        ).num_parameters(),
        "threads": options.threads,
        "rounds": options.rounds,
        "systems": systems,
        "failures": check(systems, options.teacher is not None),
    }
    name = NAME if options.teacher is None else f"{NAME}_distilled"
    return evidence.conclude(options.results, name, data, format_results(data))


if __name__ == "__main__":
    common.run_main(main)
