"""Settings of every test: one arithmetic thread, no network, no display, nothing written to the user's home."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.programs import run_forked

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["MKL_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["MPLBACKEND"] = "Agg"
os.environ["NO_COLOR"] = "1"


@pytest.fixture(autouse=True)
def _private_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Downloads are looked for in a folder of this test session, never in the user's cache."""
    monkeypatch.setenv("CVM_TRANSLATOR_CACHE", str(Path(tmp_path_factory.getbasetemp()) / "cache"))


@pytest.fixture(autouse=True)
def _forked_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a command starts in a fresh interpreter when a test calls it in this process."""
    monkeypatch.setattr(subprocess, "run", run_forked)
