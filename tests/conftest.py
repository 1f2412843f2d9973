"""Settings of every test: one arithmetic thread, no network, no display, nothing written to the user's home."""

from __future__ import annotations

import importlib.util
import os
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.programs import run_forked

if TYPE_CHECKING:
    import torch

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


@pytest.fixture
def kernel_device(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """Where Triton's kernels are tried: a CUDA device, or Triton's interpreter where it is installed without one."""
    import torch

    if torch.cuda.is_available():
        return torch.device("cuda")
    if importlib.util.find_spec("triton") is None:
        pytest.skip("needs a CUDA device, or Triton to interpret its kernels: pip install triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # read when a kernel is defined
    return torch.device("cpu")
