"""The kernels are tried on a CUDA device, or by Triton's interpreter where Triton is installed without one."""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is imported


@pytest.fixture
def device() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda")
    if importlib.util.find_spec("triton") is None:
        pytest.skip("needs a CUDA device, or Triton to interpret its kernels: pip install triton")
    return torch.device("cpu")
