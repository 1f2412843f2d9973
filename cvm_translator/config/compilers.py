"""What there is on this machine to compile kernels with.

Triton comes with PyTorch's CUDA builds and needs a C compiler at hand. Where either is missing, PyTorch's operators are
used; the numbers agree up to the order of sums.
"""

from __future__ import annotations

import importlib.util
import os
import shutil

HAS_COMPILER = any(map(shutil.which, filter(None, [os.environ.get("CC"), "cc", "gcc", "clang"])))
HAS_TRITON = HAS_COMPILER and importlib.util.find_spec("triton") is not None
"""Whether Triton's kernels can run on a CUDA device."""
