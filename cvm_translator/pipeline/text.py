"""The first two stages: clean, split text and the pieces it is cut into. Each skips what is complete and intact."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cvm_translator.config.schema import CorpusConfig, TokenizerConfig
from cvm_translator.corpus.build import CorpusSummary
from cvm_translator.corpus.build import build_corpus as build_corpus_files
from cvm_translator.corpus.split_file import SplitFile
from cvm_translator.corpus.tokenizer import Tokenizer
from cvm_translator.corpus.tokenizer import build_tokenizer as build_tokenizer_files
from cvm_translator.models.description import TOKENIZER_FILE
from cvm_translator.models.folder import find_model_folder
from cvm_translator.pipeline.context import RunContext, stage
from cvm_translator.runs import atomic
from cvm_translator.validation.preflight import check_alignment, check_leakage

CHECKS_VERSION = 1
"""Grows whenever the checks would find more."""


@dataclass(frozen=True)
class Corpus:
    """The cleaned text of a run."""

    summary: CorpusSummary
    train: SplitFile
    validation: SplitFile
    test: SplitFile
    unseen: SplitFile
    sha256: str
    """Hash over all splits."""

    def splits(self) -> dict[str, SplitFile]:
        return {"train": self.train, "validation": self.validation, "test": self.test, "unseen": self.unseen}


def build_corpus(context: RunContext) -> Corpus:
    config, directory = context.config.corpus, context.layout.corpus
    with stage(context, "corpus") as note:
        summary = prepare_corpus(config, directory, Path.cwd(), context.note)
        splits = summary.open_splits()
        note.skipped = summary.reused
        note.summary = {name: len(pairs) for name, pairs in splits.items()}
    return Corpus(summary, **splits, sha256=summary.sha256)


def prepare_corpus(
    config: CorpusConfig, directory: Path, base_dir: Path, report: Callable[[str], None]
) -> CorpusSummary:
    """Build or reuse the corpus, and check once that its pairs belong together and its splits share nothing.

    A corpus that has failed the checks fails them again: that they were passed is recorded in `checks.json`.
    """
    summary = build_corpus_files(config, directory, seed=config.split_seed, base_dir=base_dir, report=report)
    record, passed = directory / "checks.json", {"corpus": summary.sha256, "version": CHECKS_VERSION}
    with contextlib.suppress(FileNotFoundError, ValueError):
        if atomic.read_json(record) == passed:
            return summary
    splits = summary.open_splits()
    check_leakage(splits)
    for name, pairs in splits.items():
        check_alignment(pairs, f"corpus.{name}")
    atomic.write_json(record, passed)
    return summary


def build_tokenizer(context: RunContext, corpus: Corpus) -> Tokenizer:
    config, teacher = context.config.tokenizer, context.config.teacher
    if teacher.path is not None and config.path is None:
        # A student can only copy a teacher's distribution over the same pieces.
        config = TokenizerConfig(path=find_model_folder(teacher.path) / TOKENIZER_FILE)
    with stage(context, "tokenizer") as note:
        manifest = context.layout.tokenizer / "manifest.json"
        before = manifest.stat().st_mtime_ns if manifest.exists() else None
        tokenizer = build_tokenizer_files(
            config,
            context.layout.corpus,
            context.layout.tokenizer,
            report=context.note,
            train_sha256=corpus.train.sha256,
        )
        note.skipped = manifest.stat().st_mtime_ns == before
        note.summary = {"pieces": tokenizer.vocab_size}
    return tokenizer
