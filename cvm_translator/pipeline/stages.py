"""The stages up to the trained student, in order. Each records its inputs and outputs, and a rerun skips what is complete.

What the finished student goes through (files, gate, report) is in `delivery`.
"""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cvm_translator.checkpoints.store import CheckpointStore
from cvm_translator.config.schema import ModelConfig, RunConfig, TokenizerConfig, ValidationSettings
from cvm_translator.corpus.batches import BatchSchedule
from cvm_translator.corpus.build import CorpusSummary, load_split
from cvm_translator.corpus.build import build_corpus as build_corpus_files
from cvm_translator.corpus.dataset import DistillationDataset
from cvm_translator.corpus.records import Pair
from cvm_translator.corpus.tokenizer import Tokenizer
from cvm_translator.corpus.tokenizer import build_tokenizer as build_tokenizer_files
from cvm_translator.errors import ConfigError
from cvm_translator.losses.distillation import DistillationLoss
from cvm_translator.models.decoding import translate_texts
from cvm_translator.models.folder import LoadedModel, load_model, save_model
from cvm_translator.models.initialization import init_from_teacher, init_random
from cvm_translator.models.transformer import CvmTransformer
from cvm_translator.pipeline.context import RunContext, StageRecord, stage
from cvm_translator.pipeline.preflight import describe_preflight, run_preflight
from cvm_translator.quantization import AdvancedQuantizer, QuantizationType
from cvm_translator.runs import atomic
from cvm_translator.teachers.states import TeacherStates, compute_states_bytes, obtain_states
from cvm_translator.training.device import uses_bfloat16
from cvm_translator.training.judges import ValidationJudge
from cvm_translator.training.loop import LoopOutcome, LoopSetup, TrainingLoop
from cvm_translator.training.objectives import DistillationObjective
from cvm_translator.training.state import seed_everything
from cvm_translator.validation import DistillationValidator, ValidationConfig
from cvm_translator.validation.preflight import check_alignment, check_leakage


@dataclass(frozen=True)
class Corpus:
    """The cleaned text of a run."""

    summary: CorpusSummary
    train: list[Pair]
    validation: list[Pair]
    test: list[Pair]
    unseen: list[Pair]
    sha256: str
    """Hash over all splits."""

    def splits(self) -> dict[str, list[Pair]]:
        return {"train": self.train, "validation": self.validation, "test": self.test, "unseen": self.unseen}


@dataclass(frozen=True)
class Teacher:
    """The model to copy, from its files."""

    loaded: LoadedModel
    folder: Path
    sha256: str

    @property
    def model(self) -> CvmTransformer:
        return self.loaded.model


@dataclass(frozen=True)
class StudentOutcome:
    """What the distillation delivered: the folder of the float weights, and how the loop went."""

    loop: LoopOutcome
    weights: dict[str, torch.Tensor]
    preflight: dict[str, Any]
    teacher_record: dict[str, Any]


# ------------------------------------------------------------------------------------------------- corpus, tokenizer


def build_corpus(context: RunContext) -> Corpus:
    config, directory = context.config.corpus, context.layout.corpus
    with stage(context, "corpus") as note:
        summary = build_corpus_files(
            config, directory, seed=config.split_seed, base_dir=Path.cwd(), report=context.note
        )
        splits = {name: load_split(directory, name) for name in ("train", "validation", "test", "unseen")}
        if not summary.reused:
            check_leakage({name: [(pair.source, pair.target) for pair in pairs] for name, pairs in splits.items()})
            for name, pairs in splits.items():
                sources, targets, origins = zip(*pairs, strict=True) if pairs else ((), (), ())
                check_alignment(sources, targets, f"corpus.{name}", origins)
        note.skipped = summary.reused
        note.summary = {name: len(pairs) for name, pairs in splits.items()}
    return Corpus(summary, **splits, sha256=summary.sha256)


def build_tokenizer(context: RunContext, corpus: Corpus) -> Tokenizer:
    config, teacher = context.config.tokenizer, context.config.teacher
    if teacher.path is not None and config.path is None:
        # A student can only copy a teacher's distribution over the same pieces.
        config = TokenizerConfig(path=teacher.path / "sentencepiece.model")
    with stage(context, "tokenizer") as note:
        manifest = context.layout.tokenizer / "manifest.json"
        before = manifest.stat().st_mtime_ns if manifest.exists() else None
        tokenizer = build_tokenizer_files(config, context.layout.corpus, context.layout.tokenizer, report=context.note)
        note.skipped = manifest.stat().st_mtime_ns == before
        note.summary = {"pieces": tokenizer.vocab_size}
    return tokenizer


# ------------------------------------------------------------------------------------------------------------ teacher


def obtain_teacher(context: RunContext, corpus: Corpus, tokenizer: Tokenizer) -> Teacher:
    """Train the teacher, or take it from the run folder, the shared cache or the folder the config names."""
    with stage(context, "teacher") as note:
        if context.config.teacher.path is not None:
            teacher = _load_teacher(context, context.config.teacher.path)
            if teacher.loaded.tokenizer.sha256 != tokenizer.sha256:
                raise ConfigError(
                    f"teacher.path {teacher.folder}: its tokenizer differs from {tokenizer.path}; "
                    "leave tokenizer.path out to use the teacher's"
                )
            note.skipped = True
        else:
            teacher, note.skipped = _train_or_reuse_teacher(context, corpus, tokenizer)
        note.summary = {"parameters": teacher.model.num_parameters()}
    return teacher


def _load_teacher(context: RunContext, folder: Path) -> Teacher:
    loaded = load_model(folder, context.device)
    return Teacher(loaded, folder, atomic.sha256_file(folder / "model.safetensors"))


def _train_or_reuse_teacher(context: RunContext, corpus: Corpus, tokenizer: Tokenizer) -> tuple[Teacher, bool]:
    config, folder = context.config.teacher, context.layout.teacher / "model"
    inputs = {
        "model": config.model.model_dump(),
        "training": config.training.model_dump(),
        "seed": config.seed,
        "corpus": [atomic.sha256_file(context.layout.corpus / f"{name}.tsv") for name in ("train", "validation")],
        "tokenizer": tokenizer.sha256,
    }
    record = StageRecord(context.layout, "teacher", inputs)
    if record.load() is not None:
        return _load_teacher(context, folder), True
    cached = config.cache_dir / atomic.sha256_json(inputs)[:16] if config.cache_dir else None
    is_cached = cached is not None and (cached / "config.json").exists()
    if is_cached:
        assert cached is not None
        load_model(cached, "cpu")  # refuses a damaged one before it is copied
        _replace_folder(cached, folder)
    else:
        _train_teacher(context, corpus, tokenizer, folder)
        if cached is not None:
            _replace_folder(folder, cached)
    outputs = sorted(path for path in folder.iterdir() if path.is_file())
    record.save({"folder": str(folder.relative_to(context.layout.root))}, outputs)
    return _load_teacher(context, folder), is_cached


def _replace_folder(source: Path, target: Path) -> None:
    """Copy a folder so that the target appears whole."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=atomic.TEMPORARY_PREFIX, dir=target.parent))
    shutil.copytree(source, temporary / "folder")
    shutil.rmtree(target, ignore_errors=True)
    (temporary / "folder").rename(target)
    temporary.rmdir()
    atomic.fsync_directory(target.parent)


def _train_teacher(context: RunContext, corpus: Corpus, tokenizer: Tokenizer, folder: Path) -> None:
    config = context.config.teacher
    model = CvmTransformer(config.model, tokenizer.vocab_size)
    init_random(model, config.seed)
    model.to(context.device)
    dataset = build_dataset(context, corpus.train, tokenizer, config.model)
    loss = DistillationLoss(temperature=1.0, alpha=0.0, beta=1.0, label_smoothing=config.training.label_smoothing)
    settings = ValidationConfig.from_run(context.config, str(context.device))
    settings = dataclasses.replace(settings, settings=_surface_metrics(settings.settings))
    validator = build_validator(context, corpus, tokenizer, settings, context.layout.teacher / "validation")
    seed_everything(config.seed)
    loop = TrainingLoop(
        LoopSetup(
            stage="teacher",
            settings=config.training,
            guard=context.config.guard.model_copy(update={"enabled": True}),
            model=model,
            objective=DistillationObjective(model, loss),
            dataset=dataset,
            batches=BatchSchedule(dataset.lengths, config.training.batch_size, config.seed),
            store=build_store(context, context.layout.teacher / "checkpoints"),
            events=context.events,
            judge=build_judge(context, "teacher", validator, corpus, tokenizer, config.model, QuantizationType.NONE),
            stop=context.stop,
            device=context.device,
            validate_every_steps=config.training.validate_every_steps,
        )
    )
    with context.stop.deferred():
        outcome = loop.run()
    model.load_state_dict(loop.delivered_weights(outcome))
    metadata = {"role": "teacher", "best_step": outcome.state.best_step, "num_iterations": outcome.state.step}
    save_model_folder(context, folder, model, tokenizer, metadata)


def _surface_metrics(settings: ValidationSettings) -> ValidationSettings:
    """BLEU and chrF alone: what a teacher's checkpoints are compared by."""
    return settings.model_copy(update={"metrics": ["bleu", "chrf"], "weights": {"bleu": 1.0, "chrf": 1.0}})


# --------------------------------------------------------------------------------------------------------- distillation


def distil(context: RunContext, corpus: Corpus, tokenizer: Tokenizer, teacher: Teacher) -> StudentOutcome:
    """Pre-flight, then the guarded loop."""
    config, settings = context.config, context.config.distillation
    with stage(context, "distil") as note:
        student = build_student(context, tokenizer, teacher)
        dataset = build_dataset(context, corpus.train, tokenizer, config.student.model, teacher.model.config)
        loss = DistillationLoss(settings.temperature, settings.alpha, settings.beta, settings.label_smoothing)
        validator = build_validator(
            context, corpus, tokenizer, ValidationConfig.from_run(config, str(context.device)), context.layout.validation
        )
        record = validator.score_teacher(build_translate(context, teacher.model, tokenizer), teacher.sha256)
        preflight = run_preflight(context, student, teacher.model, loss, dataset, record["scores"])
        preflight["smallest_detectable_drop"] = validator.detector.smallest_detectable_drop()
        context.note(describe_preflight(preflight))
        states = obtain_teacher_states(context, teacher, dataset) if loss.needs_teacher else None
        quantization = QuantizationType(config.quantization.method)
        seed_everything(config.seed)
        loop = TrainingLoop(
            LoopSetup(
                stage="distil",
                settings=settings,
                guard=config.guard,
                model=student,
                objective=DistillationObjective(student, loss, teacher.model if loss.needs_teacher else None, states),
                dataset=dataset,
                batches=BatchSchedule(dataset.lengths, settings.batch_size, config.seed),
                store=build_store(context, context.layout.checkpoints),
                events=context.events,
                judge=build_judge(context, "distil", validator, corpus, tokenizer, config.student.model, quantization),
                stop=context.stop,
                device=context.device,
                validate_every_steps=config.validation.every_steps,
                quantize_from_step=first_quantized_step(config),
                faults=list(config.fault_injection),
            )
        )
        with context.stop.deferred():
            outcome = loop.run()
        note.summary = {"steps": outcome.state.step, "best_step": outcome.state.best_step}
        return StudentOutcome(outcome, loop.delivered_weights(outcome), preflight, record)


def obtain_teacher_states(context: RunContext, teacher: Teacher, dataset: DistillationDataset) -> TeacherStates | None:
    """The teacher's stored states where they are exact and pay, else None: the teacher then runs at each step."""
    config, settings = context.config, context.config.distillation
    num_visits = settings.num_iterations * settings.batch_size / max(1, len(dataset))
    if not config.teacher.store_states or config.fault_injection or num_visits <= 1.5:
        return None
    if not uses_bfloat16(settings.precision, context.device):
        return None
    size_mib = compute_states_bytes(dataset, teacher.model.config.dim) / 2**20
    if size_mib > config.teacher.states_budget_mib:
        context.note(
            f"teacher states would take {size_mib:,.0f} MiB, over teacher.states_budget_mib"
            f" {config.teacher.states_budget_mib}: the teacher runs at each step"
        )
        return None
    start = time.monotonic()
    states, was_there = obtain_states(
        teacher.model, teacher.sha256, dataset, context.layout.teacher / "states", context.stop.raise_if_requested
    )
    how = "reused" if was_there else f"computed in {time.monotonic() - start:.0f} s"
    context.note(f"teacher states of {len(dataset):,} pairs, {size_mib:,.0f} MiB: {how}")
    return states


def build_student(context: RunContext, tokenizer: Tokenizer, teacher: Teacher) -> CvmTransformer:
    """The student with its first weights."""
    config = context.config.student
    student = CvmTransformer(config.model, tokenizer.vocab_size)
    init_random(student, context.config.seed)
    if config.init == "teacher_layers":
        init_from_teacher(student, teacher.model, config.encoder_layers_from, config.decoder_layers_from)
    return student.to(context.device)


def first_quantized_step(config: RunConfig) -> int | None:
    """The first step that training sees through the 8-bit grid."""
    if config.quantization.method != "qat":
        return None
    return int(config.quantization.start_fraction * config.distillation.num_iterations) + 1


# ------------------------------------------------------------------------------------------------------- shared parts


def build_dataset(
    context: RunContext, pairs: Sequence[Pair], tokenizer: Tokenizer, *models: ModelConfig
) -> DistillationDataset:
    """The pairs as token ids, without those longer than the shortest of the models' limits."""
    dataset = DistillationDataset.from_pairs(pairs, tokenizer, min(model.max_length for model in models))
    if dataset.num_dropped:
        context.note(f"{dataset.num_dropped} training pairs are longer than max_length and are left out")
    return dataset


def build_store(context: RunContext, directory: Path) -> CheckpointStore:
    return CheckpointStore(
        directory, keep=context.config.keep_checkpoints, report=lambda message: context.warn("checkpoint", message)
    )


def build_translate(context: RunContext, model: CvmTransformer, tokenizer: Tokenizer) -> Callable[[list[str]], list[str]]:
    settings = context.config.validation

    def translate(sources: list[str]) -> list[str]:
        return translate_texts(
            model, tokenizer, sources, beam_size=settings.beam_size, batch_size=settings.batch_size
        )

    return translate


def build_validator(
    context: RunContext, corpus: Corpus, tokenizer: Tokenizer, config: ValidationConfig, directory: Path
) -> DistillationValidator:
    return DistillationValidator(
        config,
        directory,
        [pair.source for pair in corpus.validation],
        [pair.target for pair in corpus.validation],
        count_tokens=lambda texts: sum(len(ids) + 1 for ids in tokenizer.encode(texts)),
    )


def build_judge(
    context: RunContext,
    stage_name: str,
    validator: DistillationValidator,
    corpus: Corpus,
    tokenizer: Tokenizer,
    model: ModelConfig,
    quantization: QuantizationType,
) -> ValidationJudge:
    quantizer = AdvancedQuantizer(quantization)
    held_out = DistillationDataset.from_pairs(corpus.validation, tokenizer, model.max_length)
    return ValidationJudge(stage_name, context.events, validator, tokenizer, quantizer.convert, held_out)


def save_model_folder(
    context: RunContext, folder: Path, model: CvmTransformer, tokenizer: Tokenizer, metadata: dict[str, Any]
) -> None:
    languages = context.config.corpus
    save_model(
        folder,
        model,
        tokenizer,
        source_language=languages.source_language,
        target_language=languages.target_language,
        metadata=metadata,
        replace=True,
    )
