"""Scoring one model folder on a test set: what `cvm-translator validate` does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from cvm_translator.config import load_config
from cvm_translator.config.schema import GuardConfig, TsvSource, ValidationSettings
from cvm_translator.corpus.build import load_split
from cvm_translator.corpus.readers import ReaderContext, read_source
from cvm_translator.corpus.records import BadRow, Pair
from cvm_translator.errors import CorpusError
from cvm_translator.models.description import load_model_config
from cvm_translator.models.folder import find_model_folder
from cvm_translator.pipeline.measure import measure_sentences
from cvm_translator.runs.layout import RunLayout
from cvm_translator.training.device import build_device, configure_threads
from cvm_translator.validation import TranslationQualityEvaluator, ValidationConfig


def validate_model(path: Path, test: Path | None = None, device: str = "auto") -> dict[str, Any]:
    """Translate and score a model folder, or a run folder's student, on `test` (TSV: source, tab, reference).

    Without `test`, a run folder's own test set is used. The model is loaded from its files in a fresh process.
    """
    layout = RunLayout(path)
    is_run = layout.config.exists()
    model = find_model_folder(layout.student if is_run else path)
    if test is None and not is_run:
        raise CorpusError(f"{path} is a model folder, which has no test set of its own: name one with --test FILE.tsv")
    pairs = load_split(layout.corpus, "test") if test is None else read_pairs(test)
    settings = load_config(layout.config).validation if is_run else ValidationSettings()
    described = load_model_config(model)
    resolved = build_device(device)
    configure_threads(None, resolved, deterministic=False)
    sources = [pair.source for pair in pairs]
    measured = measure_sentences(
        model,
        sources,
        beam_size=settings.beam_size,
        batch_size=settings.batch_size,
        device=str(resolved),
        num_threads=torch.get_num_threads(),
    )
    evaluator = TranslationQualityEvaluator(
        ValidationConfig(
            settings, GuardConfig(), described["source_language"], described["target_language"], device=str(resolved)
        )
    )
    measurement = evaluator.evaluate(sources, measured["hypotheses"], [pair.target for pair in pairs])
    return {
        "model": str(model),
        "test": str(test or layout.corpus / "test.tsv"),
        "num_sentences": len(pairs),
        "scores": measurement.scores,
        "signatures": measurement.signatures,
        "probes": measurement.probe_counts,
        "failures": measurement.failures,
        "tokens_per_second": measured["tokens_per_second"],
        "peak_memory_mib": measured["peak_memory_mib"],
    }


def read_pairs(path: Path) -> list[Pair]:
    """The pairs of a TSV file; a malformed row is an error here, since a score must not leave rows out silently."""
    pairs: list[Pair] = []
    for row in read_source(TsvSource(format="tsv", path=path), ReaderContext("", "", Path(), Path(), 1_000_000, print)):
        if isinstance(row, BadRow):
            raise CorpusError(f"{row.origin}: {row.reason}; mend the row, since every row of a test set is scored")
        if isinstance(row, Pair):
            pairs.append(row)
    if not pairs:
        raise CorpusError(f"{path} holds no pairs: expected source, tab, reference on each line")
    return pairs
