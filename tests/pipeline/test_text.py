"""Corpus and tokenizer at a start that finds them built: each file is read once to be verified."""

from __future__ import annotations

import hashlib
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cvm_translator.config import load_config
from cvm_translator.pipeline.text import build_corpus, build_tokenizer
from cvm_translator.runs.layout import RunLayout


def test_the_training_text_is_hashed_once_a_start(numbers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(numbers.write_config("hashed"), [], numbers.folder / "hashed")

    def ignore(*_: Any, **__: Any) -> None: ...

    context: Any = SimpleNamespace(
        config=config,
        layout=RunLayout(Path(config.output_dir)),
        note=ignore,
        beat=ignore,
        stop=SimpleNamespace(raise_if_requested=ignore),
        events=SimpleNamespace(write=ignore),
        heartbeat=SimpleNamespace(beat=ignore),
    )
    built = build_corpus(context)
    tokenizer = build_tokenizer(context, built)
    hashed, digest = Counter[str](), hashlib.file_digest

    def watch(stream: Any, name: str) -> Any:
        hashed[Path(stream.name).name] += 1
        return digest(stream, name)

    monkeypatch.setattr(hashlib, "file_digest", watch)
    found = build_corpus(context)
    assert found.summary.reused and found.train.sha256 == built.train.sha256 and found.sha256 == built.sha256
    assert build_tokenizer(context, found).sha256 == tokenizer.sha256
    assert hashed["train.tsv"] == hashed["validation.tsv"] == 1
