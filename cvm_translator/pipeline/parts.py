"""The parts that the teacher's and the student's training both need, built from the run's config."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import loky
import torch

from cvm_translator.checkpoints.store import CheckpointStore
from cvm_translator.config.schema import ModelConfig, TrainingConfig
from cvm_translator.corpus.batches import BatchSchedule
from cvm_translator.corpus.dataset import DistillationDataset
from cvm_translator.corpus.tokenizer import Tokenizer
from cvm_translator.corpus.tokens import obtain_tokens
from cvm_translator.errors import ConfigError, CorpusError
from cvm_translator.models.decoding import translate_texts
from cvm_translator.models.folder import save_model
from cvm_translator.models.perplexity import compute_perplexity, measure_reference_losses
from cvm_translator.models.transformer import CvmTransformer
from cvm_translator.pipeline.context import RunContext
from cvm_translator.pipeline.text import Corpus
from cvm_translator.runs.micro_batches import read_factors
from cvm_translator.training.judges import Deploy, ValidationJudge
from cvm_translator.validation import DistillationValidator, ValidationConfig
from cvm_translator.validation.scoring import ScoringProcess

LEAST_FREE_CORES = 2
"""Left free by training on a GPU, for scores to be computed beside it without being asked for."""

Training = TypeVar("Training", bound=TrainingConfig)
Perplexity = Callable[[CvmTransformer], float | None]


def build_dataset(
    context: RunContext, corpus: Corpus, tokenizer: Tokenizer, *models: ModelConfig
) -> DistillationDataset:
    """The training pairs as token ids, without those longer than the shortest of the models' limits."""
    max_length = min(model.max_length for model in models)
    files = obtain_tokens(corpus.train, tokenizer, context.layout.tokenizer / "train_tokens")
    dataset = DistillationDataset.from_files(files, max_length)
    if not len(dataset):
        raise CorpusError(
            f"all {len(corpus.train)} training pairs are longer than max_length {max_length} (in tokens): raise"
            " teacher.model.max_length and student.model.max_length"
        )
    if dataset.num_dropped:
        context.note(f"{dataset.num_dropped} training pairs are longer than max_length and are left out")
    return dataset


def build_batches(
    context: RunContext, dataset: DistillationDataset, settings: TrainingConfig, seed: int
) -> BatchSchedule:
    """The order of the training pairs, with what its padding costs told."""
    batches = BatchSchedule(dataset.lengths, settings.batch_size, seed, batch_tokens=settings.batch_tokens)
    size = f"{settings.max_sentences:,} {'sentences' if settings.batch_tokens is None else 'padded tokens'}"
    context.note(
        f"batches of {size}, {batches.num_batches_per_epoch:,} an epoch;"
        f" {batches.padding_efficiency():.1%} of what they hold is text, the rest padding"
    )
    return batches


def build_store(context: RunContext, directory: Path) -> CheckpointStore:
    return CheckpointStore(
        directory, keep=context.config.keep_checkpoints, report=lambda message: context.warn("checkpoint", message)
    )


def build_translate(
    context: RunContext, model: CvmTransformer, tokenizer: Tokenizer
) -> Callable[[list[str]], list[str]]:
    settings = context.config.validation

    def translate(sources: list[str]) -> list[str]:
        return translate_texts(
            model,
            tokenizer,
            sources,
            beam_size=settings.beam_size,
            batch_size=settings.batch_size,
            on_batch=context.beat,
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


def build_perplexity(context: RunContext, corpus: Corpus, tokenizer: Tokenizer, *models: ModelConfig) -> Perplexity:
    """What finds a model's perplexity on the validation pairs that fit all of `models`."""
    max_length = min(model.max_length for model in models)
    held_out = DistillationDataset.from_pairs(corpus.validation, tokenizer, max_length)
    num_pairs, batch_size = len(corpus.validation), context.config.validation.batch_size
    return lambda model: compute_perplexity(measure_reference_losses(model, held_out, num_pairs, batch_size))


def build_judge(
    context: RunContext,
    stage_name: str,
    validator: DistillationValidator,
    corpus: Corpus,
    tokenizer: Tokenizer,
    find_perplexity: Perplexity,
    deploy: Deploy,
) -> ValidationJudge:
    return ValidationJudge(
        stage_name,
        context.events,
        validator,
        tokenizer,
        deploy,
        find_perplexity,
        beat=lambda: context.go_on("validation"),
        scoring=build_scoring(context, validator),
        on_wait=context.stop.raise_if_requested,
    )


def build_scoring(context: RunContext, validator: DistillationValidator) -> ScoringProcess | None:
    """The process that scores while training goes on, where the config asks for it or a GPU leaves the cores free."""
    on_cpu, wanted = context.device.type == "cpu", context.config.score_beside_training
    num_free = loky.cpu_count() - (torch.get_num_threads() if on_cpu else 1)
    if wanted is False or (wanted == "auto" and (on_cpu or num_free < LEAST_FREE_CORES)):
        return None
    num_threads = max(1, num_free)
    context.note(f"scores are computed beside training, by a process of its own (threads: {num_threads})")
    return ScoringProcess(validator.config, validator.sources, validator.references, num_threads)


def cut_for_memory(context: RunContext, stage_name: str, settings: Training, batches: BatchSchedule) -> Training:
    """The settings with as many micro-batches as the memory was found to need; the effective batch stays.

    Raises ConfigError where memory ran out although each micro-batch was one sentence.
    """
    factor = read_factors(context.layout.micro_batches).get(stage_name, 1)
    if factor > 1 and factor // 2 * settings.grad_accum_steps >= batches.largest_batch:
        raise ConfigError(
            f"{stage_name} ran out of memory with one sentence a micro-batch: make the model smaller, or lower"
            f" max_length, which leaves the longest pairs out (then remove {context.layout.micro_batches})"
        )
    num_micro_batches = min(settings.max_sentences, factor * settings.grad_accum_steps)
    return settings.model_copy(update={"grad_accum_steps": num_micro_batches})


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
