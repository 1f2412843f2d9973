"""The distillation stage: pre-flight, then the guarded loop.

What the finished student goes through (files, gate, report) is in `delivery`.
"""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from cvm_translator.checkpoints.store import CheckpointStore
from cvm_translator.corpus.dataset import DistillationDataset
from cvm_translator.corpus.tokenizer import Tokenizer
from cvm_translator.losses.distillation import DistillationLoss
from cvm_translator.models.initialization import init_from_teacher, init_random
from cvm_translator.models.transformer import CvmTransformer
from cvm_translator.pipeline.context import RunContext, StageRecord, stage
from cvm_translator.pipeline.formats import Calibration, build_course, build_deploy, build_prepare, check_settings
from cvm_translator.pipeline.parts import (
    build_batches,
    build_dataset,
    build_judge,
    build_perplexity,
    build_store,
    build_translate,
    build_validator,
    cut_for_memory,
)
from cvm_translator.pipeline.preflight import describe_preflight, needed_run_bytes, run_preflight
from cvm_translator.pipeline.teacher import Teacher
from cvm_translator.pipeline.text import Corpus
from cvm_translator.teachers.states import StoredTeacher, TeacherStates, TeacherTopTargets
from cvm_translator.training.device import build_autocast, is_compiled, uses_bfloat16
from cvm_translator.training.loop import TrainingLoop
from cvm_translator.training.objectives import DistillationObjective
from cvm_translator.training.resume import delivered_weights
from cvm_translator.training.setup import LoopOutcome, LoopSetup
from cvm_translator.training.state import LoopState, seed_everything
from cvm_translator.training.utilisation import StepCost, measure_peak
from cvm_translator.validation import ValidationConfig
from cvm_translator.validation.preflight import check_disk


@dataclass(frozen=True)
class StudentOutcome:
    """What the distillation delivered: the folder of the float weights, and how the loop went."""

    loop: LoopOutcome
    weights: dict[str, torch.Tensor]
    preflight: dict[str, Any]


def distil(context: RunContext, corpus: Corpus, tokenizer: Tokenizer, teacher: Teacher) -> StudentOutcome:
    """Pre-flight, then the guarded loop; a loop that has ended, also by a halt, is not entered again."""
    config = context.config
    store = build_store(context, context.layout.checkpoints)
    inputs = {"teacher": teacher.sha256, "corpus": corpus.sha256, "tokenizer": tokenizer.sha256}
    # without defaults: a setting that is added later does not make a finished loop another one
    inputs |= config.model_dump(mode="json", include=set(_SETTINGS), exclude_defaults=True)
    record = StageRecord(context.layout, "distil", inputs)
    with stage(context, "distil") as note:
        result = record.load()
        note.skipped = result is not None
        if result is None:
            result = _run_loop(context, corpus, tokenizer, teacher, store)
            record.save(result, sorted((store.directory / result["final_checkpoint"]).iterdir()))
            if context.config.teacher.cache_dir is None:
                shutil.rmtree(states_directory(context), ignore_errors=True)
        state = LoopState.from_plain(result["state"])
        note.summary = {"steps": state.step, "best_step": state.best_step}
        loop = LoopOutcome(state, result["final_checkpoint"], result["halted"], result["bits"])
        return StudentOutcome(loop, delivered_weights(store, loop), result["preflight"])


_SETTINGS = ("seed", "distillation", "student", "guard", "quantization", "validation", "fault_injection")


def _run_loop(
    context: RunContext, corpus: Corpus, tokenizer: Tokenizer, teacher: Teacher, store: CheckpointStore
) -> dict[str, Any]:
    """Train the student to the end; returns plain data."""
    config, settings = context.config, context.config.distillation
    student = build_student(context, tokenizer, teacher)
    dataset = build_dataset(context, corpus, tokenizer, config.student.model, teacher.model.config)
    loss = DistillationLoss(
        settings.temperature, settings.alpha, settings.beta, settings.label_smoothing, settings.divergence
    )
    validation = ValidationConfig.from_run(config, str(context.device))
    validator = build_validator(context, corpus, tokenizer, validation, context.layout.validation)
    find_perplexity = build_perplexity(context, corpus, tokenizer, config.student.model, teacher.model.config)
    record = validator.score_teacher(
        build_translate(context, teacher.model, tokenizer),
        teacher.sha256,
        lambda: {"perplexity": find_perplexity(teacher.model)},
    )
    check_settings(config.quantization, student)
    calibration = Calibration(dataset, config.quantization.calibration_sentences, config.seed)
    batches = build_batches(context, dataset, settings, config.seed)
    num_epochs = settings.num_iterations / batches.num_batches_per_epoch
    stored = choose_stored(context, teacher, dataset, num_epochs, needed_run_bytes(config, student))
    more_bytes = check_room_for_stored(context, stored)
    preflight = run_preflight(context, student, teacher.model, loss, dataset, record["scores"], more_bytes)
    preflight["smallest_detectable_drop"] = validator.detector.smallest_detectable_drop()
    context.note(describe_preflight(preflight))
    if stored is not None:
        fill_stored(context, teacher, dataset, stored)
    deploy = build_deploy(config.quantization, calibration)
    judge = build_judge(context, "distil", validator, corpus, tokenizer, find_perplexity, deploy)
    asked = teacher.model if loss.needs_teacher and not isinstance(stored, TeacherTopTargets) else None
    seed_everything(config.seed)
    loop = TrainingLoop(
        LoopSetup(
            stage="distil",
            settings=cut_for_memory(context, "distil", settings, batches),
            guard=config.guard,
            model=student,
            objective=DistillationObjective(student, loss, teacher.model if loss.needs_teacher else None, stored),
            dataset=dataset,
            batches=batches,
            read_stored=None if stored is None else stored.read,
            store=store,
            events=context.events,
            judge=judge,
            late=judge,
            stop=context.stop,
            heartbeat=context.heartbeat,
            control=context.control,
            device=context.device,
            is_compiled=is_compiled(context.config.compile, settings.num_iterations, context.device),
            num_threads=context.config.num_threads,
            validate_every_steps=config.validation.every_steps,
            cost=StepCost(student, asked, stored is not None, measure_peak(settings.precision, context.device)),
            widths=build_course(config),
            prepare=build_prepare(config.quantization),
            faults=list(config.fault_injection),
        )
    )
    with context.stop.deferred():
        outcome = loop.run()
    return {
        "state": outcome.state.to_plain(),
        "final_checkpoint": outcome.final_checkpoint,
        "halted": outcome.halted,
        "bits": outcome.bits,
        "preflight": preflight,
    }


def states_directory(context: RunContext) -> Path:
    """Where the teacher's states lie while the student trains; beside the shared teachers they stay for other runs."""
    return (context.config.teacher.cache_dir or context.layout.teacher) / "states"


def choose_stored(
    context: RunContext, teacher: Teacher, dataset: DistillationDataset, num_epochs: float, own_bytes: int
) -> StoredTeacher | None:
    """What of the teacher is stored, where that is exact, pays and has room, or was asked for; None: it runs at each
    step. `own_bytes`: what the run itself will write into its folder."""
    config, settings = context.config.teacher, context.config.distillation
    if settings.alpha == 0 or not config.store_states or context.config.fault_injection:
        return None
    given = (states_directory(context), teacher.model, teacher.sha256, dataset)
    if config.top_k is not None:
        precision = "bfloat16" if uses_bfloat16(settings.precision, context.device) else "float32"
        return TeacherTopTargets(*given, config.top_k, settings.temperature, precision)
    if num_epochs <= 1.5:
        return None
    stored = TeacherStates(*given)
    obstacle = _find_obstacle(context, stored, own_bytes)
    if obstacle is None:
        return stored
    context.note(f"teacher states are not stored: {obstacle}; the teacher runs at each step")
    return None


def _find_obstacle(context: RunContext, stored: TeacherStates, own_bytes: int) -> str | None:
    """Why the states cannot be stored, if they cannot."""
    config, precision = context.config.teacher, context.config.distillation.precision
    if not uses_bfloat16(precision, context.device):
        reason = f"distillation.precision {precision}"
        reason += "" if precision == "float32" else f", and this {context.device.type} has no bfloat16 products"
        return f"they are bfloat16 and training is not ({reason})"
    size = f"they would take {stored.file.num_bytes / 2**20:,.0f} MiB"
    if stored.file.num_bytes > config.states_budget_mib * 2**20:
        return f"{size}, over teacher.states_budget_mib {config.states_budget_mib}"
    needed, folder, sharers = stored.file.num_missing_bytes, stored.file.path.parent, ""
    if needed and config.cache_dir is None:
        needed, sharers = needed + own_bytes, " for them and the checkpoints"
    free = check_disk(folder, 0)
    return None if needed <= free else f"{size}, and {free / 2**20:,.0f} MiB are free in {folder}{sharers}"


def check_room_for_stored(context: RunContext, stored: StoredTeacher | None) -> int:
    """Bytes that it still needs beside the run's own; those of a shared cache elsewhere are asked for here."""
    if stored is None:
        return 0
    if context.config.teacher.cache_dir is None:
        return stored.file.num_missing_bytes
    check_disk(stored.file.path.parent, stored.file.num_missing_bytes)
    return 0


def fill_stored(context: RunContext, teacher: Teacher, dataset: DistillationDataset, stored: StoredTeacher) -> None:
    """Compute what is stored, unless it is there already and intact."""
    start, was_there = time.monotonic(), stored.file.is_intact()
    if not was_there:
        context.note(
            f"the teacher reads the training pairs once: {stored.file.num_bytes / 2**20:,.0f} MiB to be stored"
        )
        autocast = partial(build_autocast, context.config.distillation.precision, context.device)
        stored.make(teacher.model, autocast, context.go_on)
    how = "reused" if was_there else f"computed in {time.monotonic() - start:.0f} s"
    context.note(f"{stored.describe()} of {len(dataset):,} pairs, {stored.file.num_bytes / 2**20:,.0f} MiB: {how}")


def build_student(context: RunContext, tokenizer: Tokenizer, teacher: Teacher) -> CvmTransformer:
    """The student with its first weights."""
    config = context.config.student
    student = CvmTransformer(config.model, tokenizer.vocab_size)
    init_random(student, context.config.seed)
    if config.init == "teacher_layers":
        init_from_teacher(student, teacher.model, config.encoder_layers_from, config.decoder_layers_from)
    return student.to(context.device)
