"""The teacher: trained here, or taken from the run folder, the shared cache or the folder that the config names."""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from cvm_translator.config.schema import ModelConfig, RunConfig, ValidationSettings
from cvm_translator.corpus.tokenizer import Tokenizer
from cvm_translator.errors import ConfigError
from cvm_translator.losses.distillation import DistillationLoss
from cvm_translator.models.description import load_model_config
from cvm_translator.models.folder import LoadedModel, find_model_folder, load_model
from cvm_translator.models.initialization import init_random
from cvm_translator.models.transformer import CvmTransformer
from cvm_translator.pipeline.context import RunContext, StageRecord, stage
from cvm_translator.pipeline.parts import (
    build_batches,
    build_dataset,
    build_judge,
    build_perplexity,
    build_store,
    build_validator,
    cut_for_memory,
    save_model_folder,
)
from cvm_translator.pipeline.preflight import check_room, needed_disk_bytes
from cvm_translator.pipeline.text import Corpus
from cvm_translator.runs import atomic
from cvm_translator.training.device import is_compiled
from cvm_translator.training.loop import TrainingLoop
from cvm_translator.training.objectives import DistillationObjective
from cvm_translator.training.resume import delivered_weights
from cvm_translator.training.setup import LoopSetup
from cvm_translator.training.state import seed_everything
from cvm_translator.training.utilisation import StepCost, measure_peak
from cvm_translator.validation import ValidationConfig


@dataclass(frozen=True)
class Teacher:
    """The model to copy, from its files."""

    loaded: LoadedModel
    folder: Path
    sha256: str

    @property
    def model(self) -> CvmTransformer:
        return self.loaded.model


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


def check_given_teacher(config: RunConfig) -> None:
    """Refuse a teacher folder that cannot serve this run, before anything else is done; one that is trained passes."""
    if config.teacher.path is None:
        return
    folder = find_model_folder(config.teacher.path)
    described = load_model_config(folder)
    ours = (config.corpus.source_language, config.corpus.target_language)
    theirs = (described["source_language"], described["target_language"])
    if ours != theirs:
        raise ConfigError(
            f"teacher.path {folder} translates {' to '.join(theirs)}, the corpus is {' to '.join(ours)}: "
            "name another teacher or correct corpus.source_language and corpus.target_language"
        )
    if config.student.init == "teacher_layers" and described["number_format"] != "float32":
        raise ConfigError(
            f"teacher.path {folder} is {described['number_format']}, whose layers cannot be copied: "
            "name a float32 model folder or use student.init random"
        )
    try:
        config.student.check_teacher(ModelConfig.model_validate(described["model"]))
    except ValueError as error:
        raise ConfigError(f"teacher.path {folder}: {error}") from None


def _load_teacher(context: RunContext, path: Path) -> Teacher:
    folder = find_model_folder(path)
    loaded = load_model(folder, context.device)
    return Teacher(loaded, folder, atomic.sha256_file(folder / "model.safetensors"))


def _train_or_reuse_teacher(context: RunContext, corpus: Corpus, tokenizer: Tokenizer) -> tuple[Teacher, bool]:
    config, folder = context.config.teacher, context.layout.teacher / "model"
    inputs = {
        # what is not set is left out, so that a setting added later does not make every cached teacher a stranger
        "model": config.model.model_dump(exclude_none=True),
        "training": config.training.model_dump(exclude_none=True),
        "seed": config.seed,
        "corpus": [corpus.train.sha256, corpus.validation.sha256],
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
    has_average = config.training.ema_decay > 0
    check_room(
        context,
        context.layout.teacher / "checkpoints",
        needed_disk_bytes(model.num_parameters(), context.config.keep_checkpoints, has_average=has_average),
    )
    dataset = build_dataset(context, corpus, tokenizer, config.model)
    loss = DistillationLoss(temperature=1.0, alpha=0.0, beta=1.0, label_smoothing=config.training.label_smoothing)
    settings = ValidationConfig.from_run(context.config, str(context.device))
    settings = dataclasses.replace(settings, settings=_surface_metrics(settings.settings))
    validator = build_validator(context, corpus, tokenizer, settings, context.layout.teacher / "validation")
    find_perplexity = build_perplexity(context, corpus, tokenizer, config.model)
    batches = build_batches(context, dataset, config.training, config.seed)
    judge = build_judge(context, "teacher", validator, corpus, tokenizer, find_perplexity, deploy_as_it_is)
    seed_everything(config.seed)
    loop = TrainingLoop(
        LoopSetup(
            stage="teacher",
            settings=cut_for_memory(context, "teacher", config.training, batches),
            guard=context.config.guard.model_copy(update={"enabled": True}),
            model=model,
            objective=DistillationObjective(model, loss),
            dataset=dataset,
            cost=StepCost(model, None, False, measure_peak(config.training.precision, context.device)),
            batches=batches,
            store=build_store(context, context.layout.teacher / "checkpoints"),
            events=context.events,
            judge=judge,
            late=judge,
            stop=context.stop,
            heartbeat=context.heartbeat,
            control=context.control,
            device=context.device,
            is_compiled=is_compiled(context.config.compile, config.training.num_iterations, context.device),
            num_threads=context.config.num_threads,
            validate_every_steps=config.training.validate_every_steps,
        )
    )
    with context.stop.deferred():
        outcome = loop.run()
    model.load_state_dict(delivered_weights(loop.setup.store, outcome))
    metadata = {"role": "teacher", "best_step": outcome.state.best_step, "num_iterations": outcome.state.step}
    save_model_folder(context, folder, model, tokenizer, metadata)


def deploy_as_it_is(model: CvmTransformer, bits: int) -> CvmTransformer:
    """A teacher is used in float."""
    return model


def _surface_metrics(settings: ValidationSettings) -> ValidationSettings:
    """BLEU and chrF alone: what a teacher's checkpoints are compared by."""
    return settings.model_copy(update={"metrics": ["bleu", "chrf"], "weights": {"bleu": 1.0, "chrf": 1.0}})
