"""Kernels in Triton for CUDA devices, where PyTorch's own lose most of their time to short sentences or large
vocabularies.

Triton comes with PyTorch's CUDA builds and needs a C compiler at hand. Where either is missing, and on every other
device, PyTorch's operators are used; the numbers agree up to the order of sums.
"""

from __future__ import annotations

import importlib.util
import os
import shutil

from torch import Tensor

HAS_COMPILER = any(map(shutil.which, filter(None, [os.environ.get("CC"), "cc", "gcc", "clang"])))
HAS_TRITON = HAS_COMPILER and importlib.util.find_spec("triton") is not None


def can_run_on(tensor: Tensor) -> bool:
    """Whether kernels of this package can read the tensor."""
    return HAS_TRITON and tensor.device.type == "cuda"
