"""How long a thread that has done its part of an operation waits awake for the others.

PyTorch's OpenMP library (libgomp) lets it spin for milliseconds. On a machine of its own that costs nothing; where
another process takes part of a core, every one of the thousands of operations of a training step waits out that
process's time slice, and two threads make one step in several seconds (benchmarks/reliability/contention.py). With a
shorter spin a waiting thread goes to sleep and leaves its core to the thread that is waited for.
"""

from __future__ import annotations

import os
from collections.abc import MutableMapping

SPIN_COUNT = 4000
"""Turns of the waiting loop; libgomp's own default is 300,000."""
_CHOSEN_BY_USER = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")


def shorten_spinning(environment: MutableMapping[str, str] = os.environ) -> None:
    """Set the spin count for this process and its children unless the user has: before torch is imported."""
    if not any(name in environment for name in _CHOSEN_BY_USER):
        environment["GOMP_SPINCOUNT"] = str(SPIN_COUNT)
