"""What becomes of memory that is freed: the process keeps it, to use it again.

A training step frees hundreds of MiB of activations and gradients and asks for them again at once. The C library gives
such memory back to the system, which hands it out again page by page and zeroed, with a fault for each page. What
`python -m benchmarks.training` measures is done with the memory kept, as by the command line.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Mapping

KEPT_BYTES = 2**31 - 1
"""As much as the function takes; what is free beyond goes back to the system."""
LARGEST_REUSED_BYTES = 32 << 20
"""The largest that glibc takes for it: larger blocks come from the system and go back to it, as ever."""
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_CHOSEN_BY_USER = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_", "GLIBC_TUNABLES")


def keep_freed_memory(environment: Mapping[str, str] = os.environ) -> bool:
    """Have glibc keep what this process frees; False where the user has chosen otherwise, or without glibc."""
    if any(name in environment for name in _CHOSEN_BY_USER):
        return False
    with contextlib.suppress(AttributeError, OSError, TypeError):  # other C libraries, other systems
        set_option = ctypes.CDLL(None).mallopt
        return bool(set_option(_MMAP_THRESHOLD, LARGEST_REUSED_BYTES) and set_option(_TRIM_THRESHOLD, KEPT_BYTES))
    return False
